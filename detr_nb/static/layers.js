// What each decoder layer of a trained model sees: boxes settle, and duplicates vanish without being struck out.

import { corners } from "./geometry.js";
import { choice, follow, frame, put, slider, svg, table, toggle, two } from "./stage.js";
import { suppress } from "./suppression.js";

const SIZE = 400;
const TONES = ["#4aa8ff", "#ff8a3d", "#2fd39a", "#ff8fd0", "#ffd23f", "#9be7ff", "#d8b26e", "#cfd4da"];
const OVERLAP = 0.5; // from which NMS strikes a box

// The queries whose score counts, and those that NMS would strike.
function judge(layer, threshold) {
  const seen = layer.scores.map((_, query) => query).filter((query) => layer.scores[query] >= threshold);
  const pick = (list) => seen.map((query) => list[query]);
  const kept = suppress(pick(layer.boxes), pick(layer.scores), pick(layer.labels), OVERLAP).map((place) => seen[place]);
  return { seen, struck: seen.filter((query) => !kept.includes(query)) };
}

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "What each decoder layer sees",
    help: "Recorded from the trained model. Move the sliders with the pointer, or with Tab and the arrow keys.",
  });
  const settled = () => model.save_changes();
  const set = (name) => (value) => {
    model.set(name, value);
    settled();
  };
  const scenes = model.get("scenes");
  const names = model.get("names");
  const count = scenes[0].layers.length;
  const picture = svg("image", { class: "xp-picture", width: SIZE, height: SIZE });
  const truth = svg("g", {});
  const seen = scenes[0].layers[0].scores.map(() => {
    const [rect, text] = [svg("rect", { rx: 2 }), svg("text", {})];
    return { rect, text, element: svg("g", { class: "xp-seen xp-off" }, rect, text) };
  });
  const drawing = svg(
    "svg",
    { viewBox: `-4 -4 ${SIZE + 8} ${SIZE + 8}`, class: "xp-drawing", role: "img", "aria-label": "a drawn scene and the boxes of one decoder layer" },
    picture,
    truth,
    ...seen.map((one) => one.element),
  );

  const layer = slider({
    label: "Decoder layer", min: 1, max: count, step: 1, value: model.get("layer"),
    format: (x) => `${x} of ${count}`, changed: set("layer"),
  });
  const threshold = slider({
    label: "Score from which a box counts", min: 0.1, max: 0.95, step: 0.05, value: model.get("threshold"),
    format: two, changed: set("threshold"),
  });
  const scene = choice({
    label: "Scene",
    options: Object.fromEntries(scenes.map((_, place) => [String(place), String.fromCharCode(65 + place)])),
    value: String(model.get("scene")),
    changed: (value) => set("scene")(Number(value)),
  });
  const nms = toggle("Strike duplicates (NMS)", model.get("nms"), set("nms"));
  const answer = toggle("Show the true boxes", model.get("truth"), set("truth"));
  const numbers = table({
    caption: "Boxes above that score, in each layer",
    head: ["layer", "boxes", "NMS strikes", "objects"],
    rows: scenes[0].layers.map((_, place) => String(place + 1)),
  });
  stage.append(drawing, layer.element);
  panel.append(scene.element, nms, answer, threshold.element, numbers.element);

  const draw = () => {
    const one = scenes[model.get("scene")];
    const place = model.get("layer") - 1;
    const judged = one.layers.map((step) => judge(step, model.get("threshold")));
    const { boxes, scores, labels } = one.layers[place];
    put(picture, { href: one.image });
    truth.replaceChildren(
      ...(model.get("truth") ? one.targets : []).map((box) => {
        const [x0, y0, x1, y1] = corners(box).map((edge) => edge * SIZE);
        return svg("rect", { class: "xp-truth", x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
      }),
    );
    seen.forEach(({ rect, text, element }, query) => {
      const [x0, y0, x1, y1] = corners(boxes[query]).map((edge) => edge * SIZE);
      put(rect, { x: x0, y: y0, width: x1 - x0, height: y1 - y0 });
      put(text, { x: 0, y: 0, style: `transform: translate(${x0 + 1}px, ${Math.max(14, y0 - 5)}px)` });
      text.textContent = `${names[labels[query]]} ${two(scores[query])}`;
      element.style.setProperty("--xp-tone", TONES[labels[query] % TONES.length]);
      element.classList.toggle("xp-off", !judged[place].seen.includes(query));
      element.classList.toggle("xp-struck", model.get("nms") && judged[place].struck.includes(query));
    });
    numbers.set(judged.map((found) => [found.seen.length, found.struck.length, one.targets.length].map(String)));
    numbers.lines.forEach((line, j) => line.classList.toggle("xp-chosen", j === place));
    layer.set(place + 1);
    threshold.set(model.get("threshold"));
    scene.set(String(model.get("scene")));
    nms.firstChild.checked = model.get("nms");
    answer.firstChild.checked = model.get("truth");
    const { seen: now, struck } = judged[place];
    const plural = (n, word) => `${n} ${n === 1 ? word : word.endsWith("x") ? `${word}es` : `${word}s`}`;
    const verdict = struck.length
      ? `NMS ${model.get("nms") ? "strikes" : "would strike"} ${struck.length}.`
      : "NMS finds nothing to strike.";
    say(`Layer ${place + 1}: ${plural(now.length, "box")} for ${plural(one.targets.length, "object")}. ${verdict}`);
  };
  return follow(model, ["scene", "layer", "threshold", "nms", "truth"], draw);
}
