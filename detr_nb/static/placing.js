// One query of several detectors, recorded from many places of a picture: its attention and its box follow a point.

import { spreadOf, unpack } from "./attention.js";
import { corners } from "./geometry.js";
import { cellAt, meanDistance, middleOf, shareInside } from "./looking.js";
import { boxInWords } from "./movable.js";
import { arrowKeys, choice, dragging, follow, frame, put, svg, table, two } from "./stage.js";
import { veilOver } from "./veil.js";

const SIZE = 400;

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "Move one query",
    help: "Recorded from the detectors at the dotted places. Drag the point, tap a place, or Tab to the point and use the arrow keys. The ring is where the detector itself has put this query.",
  });
  const { image, grid, members } = model.get("record");
  const names = model.get("names");
  const set = (name, value) => {
    model.set(name, value);
    model.save_changes();
  };
  const move = (row, column) => {
    const within = (value) => Math.min(grid - 1, Math.max(0, value));
    set("place", [within(row), within(column)]);
  };
  const shares = members.map(({ rows, columns, first, last }) => ({
    first: unpack(first.weights, rows * columns),
    last: unpack(last.weights, rows * columns),
  }));
  const veils = members.map(({ rows, columns }) => veilOver(SIZE, rows, columns));
  const veil = svg("g", {});
  const spots = Array.from({ length: grid * grid }, (_, place) => {
    const [x, y] = middleOf(place, grid, grid);
    return svg("circle", { class: "xp-spot", cx: x * SIZE, cy: y * SIZE, r: 2 });
  });
  const ring = svg("circle", { class: "xp-home", r: 9 });
  const [rect, text] = [svg("rect", { rx: 2 }), svg("text", {})];
  const seen = svg("g", { class: "xp-seen xp-follows" }, rect, text);
  const point = svg(
    "g",
    { class: "xp-point xp-focus", tabindex: 0, role: "application", "aria-roledescription": "movable point" },
    svg("circle", { class: "xp-reach", r: 16 }),
    svg("circle", { class: "xp-dot", r: 8 }),
  );
  const map = svg(
    "g",
    { class: "xp-cells" },
    svg("image", { class: "xp-picture", width: SIZE, height: SIZE, href: image }),
    veil,
    ...spots,
    ring,
    seen,
    point,
  );
  const drawing = svg(
    "svg",
    { viewBox: `-10 -10 ${SIZE + 20} ${SIZE + 20}`, class: "xp-drawing", role: "group", "aria-label": "a picture under a veil" },
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

  const who = choice({
    label: "Detector",
    options: members.map(({ name }, member) => [String(member), name]),
    value: String(model.get("member")),
    changed: (value) => set("member", Number(value)),
  });
  who.element.classList.add("xp-list");
  const layer = choice({
    label: "Decoder layer",
    options: { first: "First", last: "Last" },
    value: model.get("layer"),
    changed: (value) => set("layer", value),
  });
  const numbers = table({
    caption: "From this place: cells looked at, distance from the point",
    head: ["", "cells", "distance", "says"],
    rows: members.map(({ name }) => name),
  });
  stage.append(drawing);
  panel.append(who.element, layer.element, numbers.element);

  const draw = () => {
    const [chosen, [row, column], which] = ["member", "place", "layer"].map((name) => model.get(name));
    const place = row * grid + column;
    const [x, y] = middleOf(place, grid, grid);
    const looks = members.map((member, number) => {
      const { rows, columns, [which]: { boxes, labels, scores } } = member;
      const weights = shares[number][which][place];
      return {
        weights, box: boxes[place], says: `${names[labels[place]]} ${two(scores[place])}`, cells: spreadOf(weights).toFixed(0),
        distance: two(meanDistance(weights, [x, y], rows, columns)), inside: shareInside(weights, boxes[place], rows, columns),
      };
    });
    const { name, rows, columns, home } = members[chosen];
    const { weights, box, says, cells, distance, inside } = looks[chosen];
    veils[chosen].set(weights);
    veil.replaceChildren(...veils[chosen].cells);
    put(ring, { cx: home[0] * SIZE, cy: home[1] * SIZE });
    put(point, { transform: `translate(${x * SIZE} ${y * SIZE})` });
    const [x0, y0, x1, y1] = corners(box).map((edge) => SIZE * Math.min(1, Math.max(0, edge)));
    put(rect, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
    put(text, { style: `transform: translate(${Math.min(x0 + 1, SIZE - 120)}px, ${Math.max(14, y0 - 5)}px)` });
    text.textContent = says;
    numbers.set(looks.map((one) => [one.cells, one.distance, one.says]));
    numbers.lines.forEach((line, member) => line.classList.toggle("xp-chosen", member === chosen));
    who.set(String(chosen));
    layer.set(which);
    const where = `${two(x)} from the left and ${two(y)} from the top`;
    put(point, { "aria-label": `place of the query: ${where}` });
    say(
      `${name}, ${which} decoder layer: the query stands ${where} and looks at about ${cells} of ${rows * columns} cells, ` +
        `on average ${distance} away; ${Math.round(100 * inside)} % of its attention lies in its box. ` +
        `It says ${says}: ${boxInWords(box)}.`,
    );
  };
  return follow(model, ["member", "place", "layer"], draw);
}
