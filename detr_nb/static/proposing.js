// From cells to queries: start squares, what every cell says, the cells that are chosen, and their boxes layer by layer.

import { corners } from "./geometry.js";
import { levelChoice, levelKey, styleOf } from "./levels.js";
import { boxInWords } from "./movable.js";
import { cellIn, holds, rowsOf, unpackNumbers } from "./points.js";
import { arrowKeys, follow, frame, put, slider, svg, table, two } from "./stage.js";

const SIZE = 400;
const SURE = 0.5; // score from which a cell or a query counts as sure
const FAINT = 0.06; // opacity of a cell that says nothing

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "Proposals become queries",
    help: "Recorded from the detector. Move the sliders with the pointer, or with Tab and the arrow keys. Click a box, or Tab to the picture and use the arrow keys, to follow another query.",
  });
  const { image, shapes, start, said, blind, chosen, layers } = model.get("recorded");
  const names = model.get("names");
  const set = (name) => (value) => {
    model.set(name, value);
    model.save_changes();
  };
  const starts = rowsOf(unpackNumbers(start), 4);
  const says = rowsOf(unpackNumbers(said), 5);
  const places = starts.map((_, cell) => cellIn(shapes, cell));
  const ranks = new Map(chosen.map((cell, rank) => [cell, rank]));
  const hidden = new Set(blind);
  const stages = ["start squares", "what cells say", `the best ${chosen.length}`, ...layers.map((_, layer) => `after layer ${layer + 1}`)];
  const boxAt = (cell, now) => {
    if (now === 0) return starts[cell];
    return now < 3 ? says[cell].slice(0, 4) : layers[now - 3].boxes[ranks.get(cell)];
  };
  const nameAt = (rank, now) => {
    const { labels, scores } = layers[now - 3];
    return `${names[labels[rank]]} ${two(scores[rank])}`;
  };
  const cells = starts.map((_, cell) => {
    const { tone, dashes } = styleOf(places[cell].level);
    const [rect, text] = [svg("rect", { rx: 2, "stroke-dasharray": dashes }), svg("text", {})];
    const element = svg("g", { class: "xp-seen xp-proposal" }, rect, text);
    element.style.setProperty("--xp-tone", tone);
    return { rect, text, element };
  });
  const origin = svg("rect", { class: "xp-truth" });
  const path = svg("polyline", { class: "xp-trail" });
  const map = svg(
    "g",
    { class: "xp-cells xp-focus", tabindex: 0, role: "application", "aria-roledescription": "picture" },
    svg("image", { class: "xp-picture", width: SIZE, height: SIZE, href: image }),
    svg("rect", { class: "xp-veil", width: SIZE, height: SIZE, "fill-opacity": 0.35 }),
    ...cells.map((one) => one.element),
    origin,
    path,
  );
  const drawing = svg(
    "svg",
    { viewBox: `-4 -4 ${SIZE + 8} ${SIZE + 8}`, class: "xp-drawing", role: "group", "aria-label": "a picture and the boxes of its cells" },
    map,
  );
  const walk = slider({
    label: "Stage", min: 0, max: stages.length - 1, step: 1, value: model.get("stage"),
    format: (now) => `${now + 1}: ${stages[now]}`, changed: set("stage"),
  });
  const query = slider({
    label: "Follow one query", min: 0, max: chosen.length, step: 1, value: model.get("query") + 1,
    format: (number) => (number ? `query ${number}` : "none"), changed: (number) => set("query")(number - 1),
  });
  const level = levelChoice(shapes.length, model.get("level"), set("level"));
  const numbers = table({
    caption: "The query that is followed: centre and size of its box",
    head: ["", "centre", "size", "says"],
    rows: ["start", "cell", ...layers.map((_, layer) => `layer ${layer + 1}`)],
  });
  stage.append(drawing, levelKey(shapes, true), walk.element);
  panel.append(query.element, level.element, numbers.element);

  const shownAt = (cell, now, only, followed) => {
    if (cell === chosen[followed]) return true;
    return (only < 0 || places[cell].level === only) && !hidden.has(cell) && (now < 2 || ranks.has(cell));
  };
  map.addEventListener("click", (event) => {
    const { x, y } = new DOMPoint(event.clientX, event.clientY).matrixTransform(drawing.getScreenCTM().inverse());
    const [now, only, followed] = ["stage", "level", "query"].map((name) => model.get(name));
    const found = chosen
      .map((cell, rank) => ({ rank, cell, box: boxAt(cell, now) }))
      .filter(({ cell, box }) => shownAt(cell, now, only, followed) && holds(box, { x: x / SIZE, y: y / SIZE }))
      .sort((a, b) => a.box[2] * a.box[3] - b.box[2] * b.box[3])
      .map(({ rank }) => rank);
    if (found.length) set("query")(found[(found.indexOf(followed) + 1) % found.length]); // again: the box behind
  });
  arrowKeys(map, (dx, dy) => {
    const next = model.get("query") + dx + dy;
    set("query")((next + chosen.length) % chosen.length);
  });

  const top = Math.max(...says.map((one) => one[4]));
  const strength = (cell, now) => (now === 1 ? Math.max(FAINT, Math.sqrt(says[cell][4] / top)) : 1);
  const textAt = (rank, now, followed) => {
    if (now < 2 || rank === undefined) return "";
    const sure = now > 2 && (layers[now - 3].scores[rank] >= SURE || rank === followed);
    return sure ? `${rank + 1}: ${nameAt(rank, now)}` : `${rank + 1}`;
  };
  const drawCell = ({ rect, text, element }, cell, now, only, followed) => {
    const rank = ranks.get(cell);
    const box = boxAt(cell, now < 3 || rank !== undefined ? now : 1);
    const [x0, y0, x1, y1] = corners(box).map((edge) => SIZE * Math.min(1, Math.max(0, edge)));
    put(rect, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
    put(text, { style: `transform: translate(${Math.min(x0 + 1, SIZE - 30)}px, ${Math.max(14, y0 - 4)}px)` });
    text.textContent = textAt(rank, now, followed);
    const own = rank !== undefined && rank === followed;
    element.classList.toggle("xp-own", own);
    element.classList.toggle("xp-idle", !own && (now < 2 || (now > 2 && layers[now - 3].scores[rank] < SURE)));
    element.style.opacity = !shownAt(cell, now, only, followed) ? 0 : own ? 1 : strength(cell, now);
  };
  const drawFollowed = (now, followed) => {
    const steps = followed < 0 ? [] : stages.map((_, number) => boxAt(chosen[followed], number)).filter((_, number) => number !== 2);
    const walked = steps.slice(0, now > 1 ? now : now + 1);
    put(path, { points: walked.map(([x, y]) => `${x * SIZE},${y * SIZE}`).join(" ") });
    put(origin, { visibility: followed < 0 || now === 0 ? "hidden" : "visible" });
    if (followed >= 0) {
      const [x0, y0, x1, y1] = corners(steps[0]).map((edge) => edge * SIZE);
      put(origin, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
      const told = ["", two(says[chosen[followed]][4]), ...layers.map((_, layer) => nameAt(followed, layer + 3))];
      numbers.set(steps.map(([x, y, w, h], step) => [`${two(x)}, ${two(y)}`, `${two(w)} \u00d7 ${two(h)}`, told[step]]));
      cells[chosen[followed]].element.parentNode.append(cells[chosen[followed]].element, origin, path); // on top
    }
    numbers.element.hidden = followed < 0;
    numbers.lines.forEach((line, step) => line.classList.toggle("xp-chosen", step === (now > 1 ? now - 1 : now)));
  };
  const inWords = (now) => {
    const edge = hidden.size ? `; ${hidden.size} at the edge may not propose` : "";
    if (now === 0) return `Every cell has a square around its centre: ${starts.length} cells${edge}.`;
    const sure = (scores) => scores.filter((score) => score >= SURE).length;
    if (now === 1) return `Every cell says a box and a score. ${sure(says.map((one) => one[4]))} of ${says.length} cells have a score of at least ${two(SURE)}.`;
    const shares = shapes.map((_, own) => `${chosen.filter((cell) => places[cell].level === own).length} of level ${own + 1}`);
    if (now === 2) return `The ${chosen.length} cells with the best scores become queries: ${shares.join(", ")}.`;
    return `After decoder layer ${now - 2}, ${sure(layers[now - 3].scores)} of ${chosen.length} queries have a score of at least ${two(SURE)}.`;
  };
  const followedInWords = (now, followed) => {
    if (followed < 0) return "";
    const { level: own, row, column } = places[chosen[followed]];
    const told = now > 2 ? `says ${nameAt(followed, now)}` : now > 0 ? `has the score ${two(says[chosen[followed]][4])}` : "starts here";
    return ` Query ${followed + 1}, from row ${row + 1}, column ${column + 1} of level ${own + 1}, ${told}: ${boxInWords(boxAt(chosen[followed], now))}.`;
  };
  const draw = () => {
    const [now, only, followed] = ["stage", "level", "query"].map((name) => model.get(name));
    cells.forEach((one, cell) => drawCell(one, cell, now, only, followed));
    drawFollowed(now, followed);
    walk.set(now);
    query.set(followed + 1);
    level.set(String(only));
    put(map, { "aria-label": followed < 0 ? "no query is followed" : `query ${followed + 1} of ${chosen.length} is followed` });
    say(`${inWords(now)}${followedInWords(now, followed)}`);
  };
  return follow(model, ["stage", "level", "query"], draw);
}
