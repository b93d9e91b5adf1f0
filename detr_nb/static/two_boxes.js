// Two boxes: drag them, and see IoU, GIoU and L1 with their slopes.

import { corners, hullOf, measures, sharedPart, slopes, stepDown } from "./geometry.js";
import { movableBox } from "./movable.js";
import { button, choice, follow, frame, fresh, imageDrawing, put, rowOf, svg, table, two } from "./stage.js";

const SIZE = 400;
const PLACES = {
  Apart: [[0.24, 0.3, 0.26, 0.22], [0.7, 0.66, 0.3, 0.36]],
  Overlapping: [[0.42, 0.44, 0.34, 0.36], [0.58, 0.56, 0.32, 0.38]],
  "Around it": [[0.52, 0.5, 0.7, 0.66], [0.42, 0.58, 0.22, 0.24]],
};
const LOSSES = { iou: "1 \u2212 IoU", giou: "1 \u2212 GIoU", l1: "L1" };

const rectangle = ([x0, y0, x1, y1]) => ({
  x: x0 * SIZE, y: y0 * SIZE, width: (x1 - x0) * SIZE, height: (y1 - y0) * SIZE,
});

// An arrow from a point; longer for a steeper slope, though never too long to see.
function pullArrow(x, y, dx, dy) {
  const steep = Math.hypot(dx, dy);
  if (steep < 1e-6) return { d: "" };
  const long = (18 + 62 * Math.tanh(steep / 3)) / steep;
  return { d: `M${x} ${y}l${dx * long} ${dy * long}` };
}

// How the boxes lie, and where the chosen loss pushes, in words.
function inWords({ iou, giou, l1 }, [dx, dy, dw, dh], loss, edges) {
  const [a, b] = edges;
  const inside = (p, q) => p[0] <= q[0] && p[1] <= q[1] && p[2] >= q[2] && p[3] >= q[3];
  const lie = inside(a, b)
    ? "The target is inside the prediction."
    : inside(b, a) ? "The prediction is inside the target." : iou > 0 ? "They overlap." : "They do not touch.";
  const flat = (x) => Math.abs(x) < 1e-6;
  const pushes = [
    flat(dx) ? "" : dx < 0 ? "right" : "left",
    flat(dy) ? "" : dy < 0 ? "down" : "up",
    flat(dw) ? "" : dw < 0 ? "wider" : "narrower",
    flat(dh) ? "" : dh < 0 ? "taller" : "flatter",
  ].filter(Boolean);
  const push = pushes.length ? `pushes the prediction: ${pushes.join(", ")}` : "has no slope here: nothing is learned";
  return `IoU ${two(iou)}, GIoU ${two(giou)}, L1 ${two(l1)}. ${lie} ${LOSSES[loss]} ${push}.`;
}

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "Two boxes",
    help: "Drag a box or one of its corners. With the keyboard: Tab to a box, arrow keys move it, Shift and arrows resize it.",
  });
  const [arrowHead, hatch] = [fresh("head"), fresh("hatch")];
  const hull = svg("rect", { class: "xp-hull", fill: `url(#${hatch})` });
  const shared = svg("rect", { class: "xp-shared" });
  const pulls = [0, 1, 2, 3, 4].map(() => svg("path", { class: "xp-pull", "marker-end": `url(#${arrowHead})` }));
  const drawing = imageDrawing(
    SIZE,
    "the image with its two boxes",
    svg(
      "marker",
      { id: arrowHead, viewBox: "0 0 8 8", refX: 5, refY: 4, markerWidth: 4.5, markerHeight: 4.5, orient: "auto" },
      svg("path", { d: "M0 0L8 4L0 8z", class: "xp-head" }),
    ),
    svg(
      "pattern",
      { id: hatch, width: 9, height: 9, patternUnits: "userSpaceOnUse", patternTransform: "rotate(45)" },
      svg("path", { d: "M0 0V9", class: "xp-hatch" }),
    ),
  );
  const change = (name) => (box) => model.set(name, box);
  const settled = () => model.save_changes();
  const boxes = {
    target: movableBox({ drawing, size: SIZE, kind: "target", name: "target", changed: change("target"), settled }),
    prediction: movableBox({
      drawing, size: SIZE, kind: "prediction", name: "prediction", changed: change("prediction"), settled,
    }),
  };
  drawing.append(hull, shared, boxes.target.element, boxes.prediction.element, svg("g", { class: "xp-pulls" }, ...pulls));
  stage.append(drawing);

  const numbers = table({
    caption: "Each loss, and its slope by the prediction's four numbers",
    head: ["loss", "value", "x", "y", "w", "h"],
    rows: Object.values(LOSSES),
  });
  const picker = choice({
    label: "Arrows show the pull of",
    options: LOSSES,
    value: model.get("loss"),
    changed: (loss) => {
      model.set("loss", loss);
      settled();
    },
  });
  let walking = null;
  const step = () => {
    const [before, target] = [model.get("prediction"), model.get("target")];
    const next = stepDown(before, target, model.get("loss"), 0.015);
    model.set("prediction", next);
    return next !== before;
  };
  const halt = () => {
    clearInterval(walking);
    walking = null;
    walk.textContent = "Walk downhill";
    settled();
  };
  const walk = button("Walk downhill", () => {
    if (walking) return halt();
    walk.textContent = "Stop";
    walking = setInterval(() => step() || halt(), 50);
  });
  const one = button("One step", () => {
    step();
    settled();
  });
  const places = Object.entries(PLACES).map(([name, [prediction, target]]) =>
    button(name, () => {
      if (walking) halt();
      model.set("prediction", prediction);
      model.set("target", target);
      settled();
    }),
  );
  panel.append(picker.element, numbers.element, rowOf("Descend", one, walk), rowOf("Places to begin", ...places));

  const draw = () => {
    const [prediction, target, loss] = ["prediction", "target", "loss"].map((name) => model.get(name));
    const [a, b] = [corners(prediction), corners(target)];
    const [values, slope] = [measures(prediction, target), slopes(prediction, target)];
    boxes.prediction.set(prediction);
    boxes.target.set(target);
    put(hull, rectangle(hullOf(a, b)));
    put(shared, rectangle(sharedPart(a, b) ?? [0, 0, 0, 0]));
    const [dx, dy, dw, dh] = slope[loss].map((x) => -x);
    const [x0, y0, x1, y1] = a.map((edge) => edge * SIZE);
    const [x, y] = [prediction[0] * SIZE, prediction[1] * SIZE];
    const arrows = [[x, y, dx, dy], [x1, y, dw, 0], [x0, y, -dw, 0], [x, y1, 0, dh], [x, y0, 0, -dh]];
    pulls.forEach((pull, j) => put(pull, pullArrow(...arrows[j])));
    const shown = { iou: 1 - values.iou, giou: 1 - values.giou, l1: values.l1 };
    numbers.set(Object.keys(LOSSES).map((name) => [shown[name], ...slope[name]].map(two)));
    numbers.lines.forEach((line, j) => line.classList.toggle("xp-chosen", Object.keys(LOSSES)[j] === loss));
    picker.set(loss);
    say(inWords(values, slope[loss], loss, [a, b]));
  };
  const leave = follow(model, ["prediction", "target", "loss"], draw);
  return () => {
    if (walking) halt();
    leave();
  };
}
