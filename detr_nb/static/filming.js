// Object queries over a training: where each predicts, which object it is matched to, and how often that changes.

import { changed, sure, trail } from "./changes.js";
import { corners } from "./geometry.js";
import { follow, frame, put, slider, svg, table, toggle, two } from "./stage.js";

const SIZE = 400;
const SURE = 0.5; // score from which a query counts as confident
const TONES = ["#4aa8ff", "#ff8a3d", "#2fd39a", "#ff8fd0", "#ffd23f", "#9be7ff", "#d8b26e", "#cfd4da"];

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "Object queries over a training",
    help: "Recorded from a training on two processor cores. Move the sliders with the pointer, or with Tab and the arrow keys.",
  });
  const set = (name) => (value) => {
    model.set(name, value);
    model.save_changes();
  };
  const record = model.get("record");
  const names = model.get("names");
  const { frames, targets } = record;
  const truth = svg("g", {});
  const path = svg("polyline", { class: "xp-trail" });
  const queries = frames[0].scores.map((_, query) => {
    const [rect, text] = [svg("rect", { rx: 2 }), svg("text", {})];
    const element = svg("g", { class: "xp-seen" }, rect, text);
    element.style.setProperty("--xp-tone", TONES[query % TONES.length]);
    return { rect, text, element };
  });
  const drawing = svg(
    "svg",
    { viewBox: `-4 -4 ${SIZE + 8} ${SIZE + 8}`, class: "xp-drawing", role: "img", "aria-label": "a drawn scene and the boxes of all queries" },
    svg("image", { class: "xp-picture", width: SIZE, height: SIZE, href: record.image }),
    truth,
    ...queries.map((one) => one.element),
    path,
  );
  truth.append(
    ...targets.map((box) => {
      const [x0, y0, x1, y1] = corners(box).map((edge) => edge * SIZE);
      return svg("rect", { class: "xp-truth", x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
    }),
  );

  const step = slider({
    label: "Training step", min: 0, max: frames.length - 1, step: 1, value: model.get("frame"),
    format: (place) => String(frames[place].step), changed: set("frame"),
  });
  const query = slider({
    label: "Follow one query", min: 0, max: queries.length, step: 1, value: model.get("query") + 1,
    format: (number) => (number ? `query ${number - 1}` : "none"), changed: (number) => set("query")(number - 1),
  });
  const all = toggle("Show queries without an object", model.get("all"), set("all"));
  const numbers = table({
    caption: "Objects and their queries",
    head: ["object", "query", "class", "score", ""],
    rows: targets.map((_, object) => String(object + 1)),
  });
  stage.append(drawing, step.element);
  panel.append(query.element, all, numbers.element);

  const draw = () => {
    const place = model.get("frame");
    const chosen = model.get("query");
    const now = frames[place];
    const moved = changed(frames, place);
    queries.forEach(({ rect, text, element }, number) => {
      const [x0, y0, x1, y1] = corners(now.boxes[number]).map((edge) => edge * SIZE);
      const object = now.matched.indexOf(number);
      put(rect, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
      put(text, { x: 0, y: 0, style: `transform: translate(${x0 + 1}px, ${Math.max(14, y0 - 5)}px)` });
      text.textContent = object >= 0 || number === chosen ? `query ${number}` : "";
      const idle = object < 0 && number !== chosen;
      element.classList.toggle("xp-idle", idle);
      element.classList.toggle("xp-off", idle && !model.get("all"));
    });
    const centres = chosen < 0 ? [] : trail(frames, chosen, place);
    put(path, { points: centres.map(([x, y]) => `${x * SIZE},${y * SIZE}`).join(" ") });
    numbers.set(
      now.matched.map((number, object) =>
        number < 0 ? ["none", "", "", ""] : [String(number), names[now.labels[number]], two(now.scores[number]), moved[object] ? "new" : ""],
      ),
    );
    numbers.lines.forEach((line, object) => line.classList.toggle("xp-chosen", now.matched[object] === chosen));
    step.set(place);
    query.set(chosen + 1);
    all.firstChild.checked = model.get("all");
    const count = moved.filter(Boolean).length;
    const before = place ? ` than at step ${frames[place - 1].step}` : "";
    const change = place ? `${count} of ${moved.length} objects have another query${before}` : "before the first step";
    say(`Step ${now.step}: ${change}; ${sure(now, SURE)} of ${queries.length} queries are confident.`);
  };
  return follow(model, ["frame", "query", "all"], draw);
}
