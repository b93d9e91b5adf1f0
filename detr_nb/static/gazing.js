// Recorded attention of a trained model on a scene: of a cell (encoder) or of an object (decoder), as a spotlight.

import { spreadOf, unpack } from "./attention.js";
import { corners } from "./geometry.js";
import { cellAt, shareInside } from "./looking.js";
import { arrowKeys, choice, follow, frame, put, svg, two } from "./stage.js";
import { veilOver } from "./veil.js";

const SIZE = 400;

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "Where the trained model looks",
    help: "Recorded from the trained model; bright cells are looked at. Click or tap the picture, or Tab to it and use the arrow keys.",
  });
  const settled = () => model.save_changes();
  const set = (name, value) => {
    model.set(name, value);
    settled();
  };
  const { image, rows, columns, encoder, decoder, objects } = model.get("record");
  const names = model.get("names");
  const [byCell, byHead] = [unpack(encoder, rows * columns), decoder.map((head) => unpack(head, rows * columns))];
  const [wide, tall] = [SIZE / columns, SIZE / rows];
  const veil = veilOver(SIZE, rows, columns);
  const frames = objects.map(({ box }) => {
    const [x0, y0, x1, y1] = corners(box).map((edge) => edge * SIZE);
    return svg("rect", { class: "xp-object", x: x0, y: y0, width: x1 - x0, height: y1 - y0, rx: 2 });
  });
  const mark = svg("rect", { class: "xp-asks", width: wide, height: tall, rx: 2 });
  const map = svg(
    "g",
    { class: "xp-cells xp-focus", tabindex: 0, role: "application", "aria-roledescription": "picture" },
    svg("image", { class: "xp-picture", width: SIZE, height: SIZE, href: image }),
    ...veil.cells,
    ...frames,
    mark,
  );
  const drawing = svg(
    "svg",
    { viewBox: `-4 -4 ${SIZE + 8} ${SIZE + 8}`, class: "xp-drawing", role: "group", "aria-label": "a drawn scene under a veil" },
    map,
  );
  stage.append(drawing);

  const titles = objects.map(({ label, score }, place) => `${place + 1}: ${names[label]} ${two(score)}`);
  const mode = choice({
    label: "Who looks",
    options: { encoder: "A cell (encoder)", decoder: "An object (decoder)" },
    value: model.get("mode"),
    changed: (value) => set("mode", value),
  });
  const which = choice({
    label: "Object",
    options: Object.fromEntries(titles.map((title, place) => [String(place), title])),
    value: String(model.get("object")),
    changed: (value) => set("object", Number(value)),
  });
  which.element.classList.add("xp-list");
  const head = choice({
    label: "Head of the last decoder layer",
    options: [["mean", "All"], ...decoder.map((_, place) => [String(place), String(place + 1)])],
    value: model.get("head"),
    changed: (value) => set("head", value),
  });
  panel.append(mode.element, which.element, head.element);

  const pick = (x, y) => {
    if (model.get("mode") === "encoder") {
      return set("cell", cellAt(x / SIZE, y / SIZE, rows, columns));
    }
    const inside = objects
      .map(({ box }, place) => [corners(box).map((edge) => edge * SIZE), place, box[2] * box[3]])
      .filter(([[x0, y0, x1, y1]]) => x >= x0 && x <= x1 && y >= y0 && y <= y1)
      .sort((a, b) => a[2] - b[2]);
    return inside.length ? set("object", inside[0][1]) : null;
  };
  map.addEventListener("click", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    pick(place.x, place.y);
  });
  arrowKeys(map, (dx, dy) => {
    if (model.get("mode") === "decoder") {
      return set("object", (model.get("object") + dx + dy + objects.length) % objects.length);
    }
    const [row, column] = model.get("cell");
    return pick((column + dx + 0.5) * wide, (row + dy + 0.5) * tall);
  });

  const within = (weights, box) => shareInside(weights, box, rows, columns);
  const percent = (share) => `${Math.round(100 * share)} %`;
  const draw = () => {
    const [who, [row, column], object, chosen] = ["mode", "cell", "object", "head"].map((name) => model.get(name));
    const cellMode = who === "encoder";
    const mean = (key) => byHead.reduce((sum, one) => sum + one[object][key], 0) / byHead.length;
    const ofObject = () => (chosen === "mean" ? byCell.map((_, key) => mean(key)) : byHead[Number(chosen)][object]);
    const weights = cellMode ? byCell[row * columns + column] : ofObject();
    veil.set(weights);
    put(mark, { x: column * wide, y: row * tall, visibility: cellMode ? "visible" : "hidden" });
    frames.forEach((one, place) => {
      one.classList.toggle("xp-lit", !cellMode && place === object);
      put(one, { visibility: cellMode ? "hidden" : "visible" });
    });
    [which, head].forEach((one) => (one.element.hidden = cellMode));
    mode.set(who);
    which.set(String(object));
    head.set(chosen);
    const spread = `looks at about ${spreadOf(weights).toFixed(0)} of ${weights.length} cells`;
    if (cellMode) {
      const best = objects
        .map(({ box }, place) => [within(weights, box), place])
        .sort((a, b) => b[0] - a[0])[0];
      put(map, { "aria-label": `row ${row}, column ${column} of the encoder's grid` });
      say(
        `The cell in row ${row}, column ${column} ${spread}. ` +
          `Of the objects it looks most at ${titles[best[1]]}: ${percent(best[0])} lies in that box.`,
      );
    } else {
      put(map, { "aria-label": `object ${titles[object]}` });
      const whose = chosen === "mean" ? "" : ` in head ${Number(chosen) + 1}`;
      say(`Object ${titles[object]} ${spread}${whose}; ${percent(within(weights, objects[object].box))} of its attention lies inside its own box.`);
    }
  };
  return follow(model, ["mode", "cell", "object", "head"], draw);
}
