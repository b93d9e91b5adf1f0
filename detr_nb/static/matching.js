// Predictions and targets that can be dragged, the table of their costs, and who belongs to whom.

import { assign, costTable, greedy, priceOf } from "./assignment.js";
import { movableBox } from "./movable.js";
import { choice, follow, frame, html, imageDrawing, slider, svg, table, two } from "./stage.js";

const SIZE = 400;
const WEIGHTS = {
  class_weight: ["Weight of the class", 5],
  l1_weight: ["Weight of L1", 10],
  giou_weight: ["Weight of GIoU", 5],
};

// Names of targets; two of one class are told apart by their number.
function nameTargets(targets, names) {
  return targets.map(({ label }, place) => {
    const same = targets.filter((other) => other.label === label);
    const rank = targets.slice(0, place).filter((other) => other.label === label).length + 1;
    return same.length > 1 ? `${names[label]} ${rank}` : names[label];
  });
}

// A line between two centres that begins and ends a little beside them.
function tie([ax, ay], [bx, by], aside) {
  const [dx, dy] = [bx - ax, by - ay];
  const long = Math.hypot(dx, dy) || 1;
  const [sx, sy] = [(-dy / long) * aside, (dx / long) * aside];
  return `M${ax * SIZE + sx} ${ay * SIZE + sy}L${bx * SIZE + sx} ${by * SIZE + sy}`;
}

export function render({ model, el }) {
  const { stage, panel, say } = frame(el, {
    title: "Who belongs to whom?",
    help: "Drag any box or corner, or Tab to it and use the arrow keys (with Shift: its size). Choose a box, then say what it shows.",
  });
  const settled = () => model.save_changes();
  const names = model.get("names");
  const called = nameTargets(model.get("targets"), names);
  const drawing = imageDrawing(SIZE, "predictions and targets in the image");
  let selected = 0;
  const change = (list, place) => (box) => {
    model.set(list, model.get(list).map((one, j) => (j === place ? { ...one, box } : one)));
  };
  const make = (list, kind, title, label = title) => (_, place) =>
    movableBox({
      drawing, size: SIZE, kind, name: title(place), label: label(place), changed: change(list, place), settled,
      focused: () => {
        if (kind === "prediction" && selected !== place) {
          selected = place;
          draw();
        }
      },
    });
  const targets = model.get("targets").map(make("targets", "target", (place) => called[place]));
  const predictions = model.get("predictions").map(make("predictions", "prediction", (place) => `prediction ${place}`, String));
  const ties = { greedy: svg("g", {}), best: svg("g", {}) };
  drawing.append(...[...targets, ...predictions].map((box) => box.element), ties.greedy, ties.best);

  const costs = table({
    caption: "What each pair costs: the stronger the colour, the cheaper",
    head: ["", ...called],
    rows: predictions.map((_, place) => `prediction ${place}`),
  });
  costs.element.classList.add("xp-costs");
  const sliders = Object.entries(WEIGHTS).map(([name, [label, max]]) => [
    name,
    slider({
      label, min: 0, max, step: 0.1, value: model.get(name), format: (x) => x.toFixed(1),
      changed: (value) => {
        model.set(name, value);
        settled();
      },
    }),
  ]);
  const belief = slider({
    label: "", min: 0, max: 1, step: 0.01, value: 0.5,
    format: (x) => `${names[0]} ${two(0.9 * (1 - x))}, ${names[1]} ${two(0.9 * x)}`,
    changed: (x) => {
      const probabilities = [0.9 * (1 - x), 0.9 * x];
      model.set("predictions", model.get("predictions").map((one, j) => (j === selected ? { ...one, probabilities } : one)));
      settled();
    },
  });
  const picker = choice({
    label: "Lines show",
    options: { best: "Best", greedy: "Greedy", both: "Both" },
    value: model.get("show"),
    changed: (value) => {
      model.set("show", value);
      settled();
    },
  });
  const key = html(
    "p", { class: "xp-key" }, html("span", {}, html("i"), "best assignment"), html("span", {}, html("i", { class: "xp-dots" }), "greedy"),
  );
  stage.append(drawing, key, picker.element);
  panel.append(costs.element, ...sliders.map(([, one]) => one.element));
  if (names.length === 2) panel.append(belief.element);

  function draw() {
    const [guesses, truth, show] = ["predictions", "targets", "show"].map((name) => model.get(name));
    guesses.forEach(({ box }, j) => predictions[j].set(box));
    truth.forEach(({ box }, j) => targets[j].set(box));
    const [classWeight, l1Weight, giouWeight] = Object.keys(WEIGHTS).map((name) => model.get(name));
    const cost = costTable(guesses, truth, { classWeight, l1Weight, giouWeight });
    const [best, greed] = [assign(cost), greedy(cost)];
    const among = (pairs, row, column) => pairs.some(([i, j]) => i === row && j === column);
    const all = cost.flat();
    const [low, high] = [Math.min(...all), Math.max(...all)];
    costs.set(cost.map((row) => row.map(two)));
    costs.cells.forEach((row, i) =>
      row.forEach((cell, j) => {
        const cheap = high > low ? (high - cost[i][j]) / (high - low) : 0;
        cell.style.setProperty("--xp-share", `${Math.round(48 * cheap ** 2)}%`);
        cell.classList.toggle("xp-taken", show !== "greedy" && among(best, i, j));
        cell.classList.toggle("xp-grabbed", show !== "best" && among(greed, i, j));
      }),
    );
    const lines = (pairs, kind, shown, aside) =>
      ties[kind].replaceChildren(
        ...(shown ? pairs : []).map(([i, j]) =>
          svg("path", { class: `xp-tie xp-${kind}`, d: tie(guesses[i].box, truth[j].box, aside) }),
        ),
      );
    lines(best, "best", show !== "greedy", 0);
    lines(greed, "greedy", show !== "best", show === "both" ? 6 : 0);
    predictions.forEach(({ element }, j) => {
      const used = (show === "greedy" ? greed : best).some(([i]) => i === j);
      element.classList.toggle("xp-quiet", !used);
    });
    sliders.forEach(([name, one]) => one.set(model.get(name)));
    if (names.length === 2) {
      const [first, second] = guesses[selected].probabilities;
      belief.element.querySelector("label").textContent = `Prediction ${selected} says`;
      belief.set(second / (first + second || 1));
    }
    picker.set(show);
    const pairs = (found) => found.map(([i, j]) => `${i}\u2013${called[j]}`).join(", ");
    const [least, more] = [priceOf(cost, best), priceOf(cost, greed)];
    const gap = more - least;
    const compare = gap < 0.005 ? "Greed finds the same price." : `Greed takes ${pairs(greed)} and pays ${two(gap)} more.`;
    say(`Best: ${pairs(best)}, in sum ${two(least)}. ${compare}`);
  }
  return follow(model, ["predictions", "targets", "show", ...Object.keys(WEIGHTS)], draw);
}
