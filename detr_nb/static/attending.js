// Attention among the cells of a toy picture: pick a query, see the shares of all keys, in one head or in several.

import { shares, spreadOf } from "./attention.js";
import { arrowKeys, choice, follow, frame, html, put, slider, svg, table, two } from "./stage.js";

const WIDE = 416;
const MINI = 88; // width of the map of one head
// What the parts of a cell's description say; heads cut it into this many parts.
const SEES = {
  1: ["everything"],
  2: ["colour", "place"],
  4: ["hue", "light", "column", "row"],
  8: ["warm", "green", "light", "grey", "column 1", "column 2", "row 1", "row 2"],
};

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "Who looks where?",
    help: "Choose the cell that asks: point and click, tap, or Tab to the picture and use the arrow keys. A larger disc is a larger share.",
  });
  const settled = () => model.save_changes();
  const picture = model.get("picture");
  const features = model.get("features");
  const [rows, columns] = [picture.length, picture[0].length];
  const side = WIDE / columns;
  const at = (place) => [Math.floor(place / columns), place % columns];
  const tint = ([r, g, b]) => `rgb(${[r, g, b].map((part) => Math.round(255 * part)).join(" ")})`;
  const cells = features.map((_, place) => {
    const [row, column] = at(place);
    return svg("rect", { x: column * side, y: row * side, width: side, height: side, fill: tint(picture[row][column]) });
  });
  const discs = features.map((_, place) => {
    const [row, column] = at(place);
    return svg("circle", { class: "xp-disc", cx: (column + 0.5) * side, cy: (row + 0.5) * side });
  });
  const mark = svg("rect", { class: "xp-asks", width: side - 4, height: side - 4, rx: 4 });
  const map = svg(
    "g",
    { class: "xp-cells xp-focus", tabindex: 0, role: "application", "aria-roledescription": "picture of cells" },
    ...cells,
    ...discs,
    mark,
  );
  const drawing = svg(
    "svg",
    { viewBox: `-4 -4 ${WIDE + 8} ${side * rows + 8}`, class: "xp-drawing", role: "group", "aria-label": "a picture of few cells" },
    map,
  );
  const choose = (row, column) => {
    const within = (x, count) => Math.min(count - 1, Math.max(0, x));
    model.set("query", [within(row, rows), within(column, columns)]);
    settled();
  };
  map.addEventListener("click", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    choose(Math.floor(place.y / side), Math.floor(place.x / side));
  });
  arrowKeys(map, (dx, dy) => {
    const [row, column] = model.get("query");
    choose(row + dy, column + dx);
  });
  stage.append(drawing);

  const strength = slider({
    label: "Scale of the scores", min: 0, max: 12, step: 0.1, value: model.get("strength"),
    format: (x) => x.toFixed(1),
    changed: (value) => {
      model.set("strength", value);
      settled();
    },
  });
  const heads = choice({
    label: "Heads",
    options: Object.fromEntries(Object.keys(SEES).map((count) => [count, count])),
    value: String(model.get("heads")),
    changed: (count) => {
      model.set("heads", Number(count));
      settled();
    },
  });
  const minis = html("div", { class: "xp-minis" });
  const numbers = table({ caption: "The answer is shared among", head: ["", "cells", "largest", "itself"], rows: ["all heads"] });
  panel.append(heads.element, strength.element, minis, numbers.element);

  const mini = (weights, name) => {
    const small = MINI / columns;
    const largest = Math.max(...weights);
    const squares = weights.map((weight, place) => {
      const [row, column] = at(place);
      return svg("rect", {
        class: "xp-cell", x: column * small, y: row * small, width: small, height: small,
        "fill-opacity": (weight / largest).toFixed(3),
      });
    });
    const text = `${name}: ${spreadOf(weights).toFixed(1)} cells`;
    return html(
      "figure",
      { class: "xp-mini" },
      svg(
        "svg",
        { viewBox: `-1 -1 ${MINI + 2} ${small * rows + 2}`, role: "img", "aria-label": text },
        svg("rect", { class: "xp-paper", width: MINI, height: small * rows }),
        ...squares,
      ),
      html("figcaption", {}, name),
    );
  };
  const draw = () => {
    const [[row, column], count, scale] = ["query", "heads", "strength"].map((name) => model.get(name));
    const place = row * columns + column;
    const each = shares(features[place], features, count, scale);
    const mean = features.map((_, key) => each.reduce((sum, weights) => sum + weights[key], 0) / count);
    const largest = Math.max(...mean);
    discs.forEach((disc, key) => put(disc, { r: (0.44 * side * Math.sqrt(mean[key] / largest)).toFixed(2) }));
    put(mark, { x: column * side + 2, y: row * side + 2 });
    put(map, { "aria-label": `the query is row ${row}, column ${column}` });
    minis.replaceChildren(...(count > 1 ? each.map((weights, head) => mini(weights, SEES[count][head])) : []));
    numbers.set([[spreadOf(mean).toFixed(1), two(largest), two(mean[place])]]);
    strength.set(scale);
    heads.set(String(count));
    const [best, far] = at(mean.indexOf(largest));
    const many = count === 1 ? "One head" : `${count} heads`;
    say(
      `${many}: row ${row}, column ${column} shares its answer among about ${spreadOf(mean).toFixed(1)} of ` +
        `${features.length} cells. The largest share, ${two(largest)}, is that of row ${best}, column ${far}.`,
    );
  };
  return follow(model, ["query", "heads", "strength"], draw);
}
