// The points that one query of a detector reads, recorded from many places of a picture.

import { unpack } from "./attention.js";
import { corners } from "./geometry.js";
import { levelChoice, levelKey, styleOf } from "./levels.js";
import { cellAt, middleOf } from "./looking.js";
import { boxInWords } from "./movable.js";
import { rowsOf, samplesOf, summed, unpackNumbers } from "./points.js";
import { arrowKeys, choice, dragging, follow, frame, put, svg, table, two } from "./stage.js";

const SIZE = 400;
const EDGE = 40; // what is shown around the picture
const LARGEST = 9; // radius of the mark of the largest weight

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "The points that one query reads",
    help: "Recorded from the detector at the dotted places. Drag the ring, tap a place, or Tab to the ring and use the arrow keys. The larger a mark, the larger its weight; points beyond the picture read zeros.",
  });
  const { image, grid, home, shapes, heads, ...layers } = model.get("recorded");
  const names = model.get("names");
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const move = (row, column) => {
    const within = (value) => Math.min(grid - 1, Math.max(0, value));
    set("place", [within(row), within(column)]);
  };
  const ends = Object.fromEntries(
    ["first", "last"].map((name) => {
      const { points, weights } = layers[name];
      const pairs = rowsOf(unpackNumbers(points), 2);
      const each = pairs.length / (grid * grid * heads);
      return [name, { places: rowsOf(pairs, heads * each), weights: rowsOf(unpack(weights, each), heads) }];
    }),
  );
  const spots = Array.from({ length: grid * grid }, (_, place) => {
    const [x, y] = middleOf(place, grid, grid);
    return svg("circle", { class: "xp-spot", cx: x * SIZE, cy: y * SIZE, r: 2 });
  });
  const ring = svg("circle", { class: "xp-home", r: 12, cx: home[0] * SIZE, cy: home[1] * SIZE });
  const before = svg("rect", { class: "xp-truth" });
  const [rect, text] = [svg("rect", { rx: 2 }), svg("text", {})];
  const marks = svg("g", { class: "xp-samples" });
  const point = svg(
    "g",
    { class: "xp-point xp-open xp-focus", tabindex: 0, role: "application", "aria-roledescription": "movable point" },
    svg("circle", { class: "xp-reach", r: 16 }),
    svg("circle", { class: "xp-dot", r: 8 }),
  );
  const map = svg(
    "g",
    { class: "xp-cells" },
    svg("image", { class: "xp-picture", width: SIZE, height: SIZE, href: image }),
    svg("rect", { class: "xp-veil", width: SIZE, height: SIZE, "fill-opacity": 0.35 }),
    ...spots,
    ring,
    before,
    svg("g", { class: "xp-seen xp-follows" }, rect, text),
    marks,
    point,
  );
  const drawing = svg(
    "svg",
    {
      viewBox: `${-EDGE} ${-EDGE} ${SIZE + 2 * EDGE} ${SIZE + 2 * EDGE}`, class: "xp-drawing", role: "group",
      "aria-label": "a picture and the points that a query reads",
    },
    map,
  );
  const moveTo = (x, y) => move(...cellAt(x / SIZE, y / SIZE, grid, grid));
  dragging(drawing, point, { began: () => point.focus({ preventScroll: true }), moved: moveTo });
  map.addEventListener("click", (event) => {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    moveTo(place.x, place.y);
  });
  arrowKeys(point, (dx, dy) => {
    const [row, column] = model.get("place");
    move(row + dy, column + dx);
  });

  const layer = choice({
    label: "Decoder layer",
    options: { first: "First", last: "Last" },
    value: model.get("layer"),
    changed: (value) => set("layer", value),
  });
  const head = choice({
    label: "Head",
    options: [["-1", "All"], ...Array.from({ length: heads }, (_, place) => [String(place), String(place + 1)])],
    value: String(model.get("head")),
    changed: (value) => set("head", Number(value)),
  });
  const level = levelChoice(shapes.length, model.get("level"), (value) => set("level", value));
  const numbers = table({
    caption: "Weight, mean distance from the reference, points in the box",
    head: ["", "weight", "distance", "in box"],
    rows: [...shapes.map((_, place) => `level ${place + 1}`), "all"],
  });
  stage.append(drawing, levelKey(shapes, false));
  panel.append(layer.element, head.element, level.element, numbers.element);

  const drawBox = (box, label) => {
    const [x0, y0, x1, y1] = corners(box).map((edge) => SIZE * Math.min(1, Math.max(0, edge)));
    put(rect, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
    put(text, { style: `transform: translate(${Math.min(x0 + 1, SIZE - 110)}px, ${Math.max(14, y0 - 5)}px)` });
    text.textContent = label;
  };
  const drawMarks = (samples) => {
    const largest = Math.max(...samples.map((one) => one.weight));
    const near = EDGE / SIZE;
    const shown = samples.filter(({ x, y }) => Math.min(x, y) >= -near && Math.max(x, y) <= 1 + near);
    shown.sort((a, b) => b.weight - a.weight); // the small ones lie on top
    marks.replaceChildren(
      ...shown.map(({ x, y, level: own, weight }) => {
        const { tone, mark } = styleOf(own);
        const radius = Math.max(1.5, LARGEST * Math.sqrt(weight / largest));
        return svg("path", { class: "xp-sample", d: mark(radius), fill: tone, transform: `translate(${x * SIZE} ${y * SIZE})` });
      }),
    );
  };
  const draw = () => {
    const [[row, column], which, chosen, only] = ["place", "layer", "head", "level"].map((name) => model.get(name));
    const place = row * grid + column;
    const { boxes, labels, scores, refs } = layers[which];
    const { places, weights } = ends[which];
    const [box, ref, says] = [boxes[place], refs[place], `${names[labels[place]]} ${two(scores[place])}`];
    const every = samplesOf(places[place], weights[place], heads, shapes.length);
    const asked = every.filter((one) => chosen < 0 || one.head === chosen);
    asked.forEach((one) => (one.weight *= chosen < 0 ? 1 : heads));
    const parts = shapes.map((_, number) => asked.filter((one) => one.level === number));
    const [x, y] = middleOf(place, grid, grid);
    drawMarks(only < 0 ? asked : parts[only]);
    drawBox(box, says);
    put(point, { transform: `translate(${x * SIZE} ${y * SIZE})` });
    const [x0, y0, x1, y1] = corners([...ref, 0, 0].slice(0, 4)).map((edge) => edge * SIZE);
    put(before, { x: x0, y: y0, width: x1 - x0, height: y1 - y0, visibility: ref.length > 2 ? "visible" : "hidden" });
    const found = [...parts, asked].map((some) => ({ ...summed(some, ref, box), count: some.length }));
    const percent = (share) => `${Math.round(100 * share)} %`;
    numbers.set(found.map((one) => [percent(one.weight), two(one.distance), `${one.inside} of ${one.count}`]));
    numbers.lines.forEach((line, number) => line.classList.toggle("xp-chosen", number === (only < 0 ? shapes.length : only)));
    layer.set(which);
    head.set(String(chosen));
    level.set(String(only));
    const where = `${two(x)} from the left and ${two(y)} from the top`;
    put(point, { "aria-label": `place of the query: ${where}` });
    const whose = chosen < 0 ? "all heads" : `head ${chosen + 1}`;
    const { distance, inside, outside, count } = found.at(-1);
    const shares = found.slice(0, -1).map((one, number) => `level ${number + 1} ${percent(one.weight)}`).join(", ");
    say(
      `${which === "first" ? "First" : "Last"} decoder layer, ${whose}: the query stands ${where} and reads ${count} points, ` +
        `on average ${two(distance)} from ${ref.length > 2 ? "the centre of its reference, the dotted box" : "it"}; weight: ${shares}. ` +
        `Of these points ${inside} lie in its box and ${outside} beyond the picture. It says ${says}: ${boxInWords(box)}.`,
    );
  };
  return follow(model, ["place", "layer", "head", "level"], draw);
}
