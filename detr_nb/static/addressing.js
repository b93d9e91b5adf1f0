// A grid of cells and their addresses: point at a cell and see how similar all others are to it.

import { addresses, similarities } from "./positions.js";
import { arrowKeys, button, follow, frame, put, rowOf, slider, svg, table, two } from "./stage.js";

const WIDE = 416;
const STRIP = 26; // height of the strip that shows the address
const FAR = [1, 2, 4, 8];
const WAYS = { "to the right": [0, 1], below: [1, 0], "both ways": [1, 1] };

// A temperature with two digits, as people say it.
const roundTemperature = (exponent) => Number((10 ** exponent).toPrecision(2));

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "How similar are two addresses?",
    help: "Point at a cell, or tap it. With the keyboard: Tab to the grid, then the arrow keys. The stronger the colour, the more similar; orange is below zero.",
  });
  const settled = () => model.save_changes();
  const [rows, columns] = [model.get("rows"), model.get("columns")];
  const side = WIDE / columns;
  const tall = side * rows;
  const cells = Array.from({ length: rows * columns }, (_, place) =>
    svg("rect", {
      class: "xp-cell", x: (place % columns) * side, y: Math.floor(place / columns) * side, width: side, height: side,
    }),
  );
  const mark = svg("rect", { class: "xp-mark", width: side, height: side, rx: 2 });
  const map = svg(
    "g",
    { class: "xp-cells xp-focus", tabindex: 0, role: "application", "aria-roledescription": "grid of cells" },
    svg("rect", { class: "xp-paper", width: WIDE, height: tall }),
    ...cells,
    mark,
  );
  const strip = svg("g", { transform: `translate(0 ${tall + 34})` });
  const notes = [0, 1].map((half) => svg("text", { class: "xp-note", x: (half * WIDE) / 2, y: tall + 26 }));
  const drawing = svg(
    "svg",
    { viewBox: `-4 -4 ${WIDE + 8} ${tall + STRIP + 44}`, class: "xp-drawing", role: "group", "aria-label": "similarity of addresses" },
    map,
    ...notes,
    strip,
  );
  stage.append(drawing);

  const choose = (row, column) => {
    const within = (x, count) => Math.min(count - 1, Math.max(0, x));
    const next = [within(row, rows), within(column, columns)];
    if (String(next) !== String(model.get("cell"))) model.set("cell", next);
  };
  const point = (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    choose(Math.floor(place.y / side), Math.floor(place.x / side));
  };
  map.addEventListener("pointermove", (event) => event.pointerType === "mouse" && point(event));
  map.addEventListener("pointerdown", point);
  map.addEventListener("pointerleave", settled);
  arrowKeys(map, (dx, dy) => {
    const [row, column] = model.get("cell");
    choose(row + dy, column + dx);
    settled();
  });

  const numbers = table({
    caption: "Similarity with the cell so many cells away",
    head: ["", ...FAR.map(String)],
    rows: Object.keys(WAYS),
  });
  const heat = slider({
    label: "Temperature", min: 0, max: 5, step: 0.05, value: Math.log10(model.get("temperature")),
    format: (exponent) => roundTemperature(exponent).toLocaleString("en"),
    changed: (exponent) => {
      model.set("temperature", roundTemperature(exponent));
      settled();
    },
  });
  const width = slider({
    label: "Width of the address", min: 3, max: 8, step: 1, value: Math.log2(model.get("width")),
    format: (power) => `${2 ** power} numbers`,
    changed: (power) => {
      model.set("width", 2 ** power);
      settled();
    },
  });
  const usual = [["Small grids: 20", 20], ["DETR: 10,000", 10000]].map(([text, temperature]) =>
    button(text, () => {
      model.set("temperature", temperature);
      settled();
    }),
  );
  panel.append(heat.element, rowOf("Usual temperatures", ...usual), width.element, numbers.element);

  const draw = () => {
    const [[row, column], temperature, d] = ["cell", "temperature", "width"].map((name) => model.get(name));
    const table = addresses(rows, columns, d, temperature);
    const place = row * columns + column;
    const similar = similarities(table, place);
    cells.forEach((cell, j) => {
      put(cell, { "fill-opacity": Math.min(1, similar[j] ** 2).toFixed(3) });
      cell.classList.toggle("xp-minus", similar[j] < 0);
    });
    put(mark, { x: column * side, y: row * side });
    const bar = WIDE / d;
    strip.replaceChildren(
      ...table[place].map((value, channel) =>
        svg("rect", {
          class: value < 0 ? "xp-cell xp-minus" : "xp-cell", x: channel * bar, width: bar, height: STRIP,
          "fill-opacity": Math.abs(value).toFixed(3),
        }),
      ),
      svg("path", { class: "xp-mark", d: `M${WIDE / 2} -3V${STRIP + 3}` }),
    );
    notes[0].textContent = `row ${row} in ${d / 2} numbers`;
    notes[1].textContent = `column ${column} in ${d / 2}`;
    const at = (down, right) => {
      const [y, x] = [row + down, column + right];
      return y < rows && x < columns ? two(similar[y * columns + x]) : "\u2013";
    };
    numbers.set(Object.values(WAYS).map(([down, right]) => FAR.map((far) => at(down * far, right * far))));
    heat.set(Math.log10(temperature));
    width.set(Math.log2(d));
    const others = similar.filter((_, j) => j !== place);
    const least = Math.min(...others);
    const blurred = others.filter((value) => value > 0.9).length;
    put(map, { "aria-label": `row ${row}, column ${column}` });
    say(
      `Row ${row}, column ${column}: the least similar cell is at ${two(least)} of the cell itself, and ` +
        `${blurred} of ${others.length} others are above 0.90.`,
    );
  };
  return follow(model, ["cell", "temperature", "width"], draw);
}
