// What a query reads at points of several levels, in numbers; points and boxes are shares of the image.

import { corners } from "./geometry.js";

/** Recorded numbers from a text of two bytes each, evenly from `low` to `high`. */
export function unpackNumbers({ low, high, text }) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const step = (high - low) / 65535;
  return Array.from({ length: bytes.length / 2 }, (_, i) => low + step * (bytes[2 * i] + 256 * bytes[2 * i + 1]));
}

/** A list cut into rows of equal width. */
export function rowsOf(list, width) {
  return Array.from({ length: list.length / width }, (_, row) => list.slice(row * width, (row + 1) * width));
}

/** Level, row and column of a cell; cells are counted level by level, row by row. */
export function cellIn(shapes, cell) {
  let [level, rest] = [0, cell];
  while (rest >= shapes[level][0] * shapes[level][1]) {
    rest -= shapes[level][0] * shapes[level][1];
    level += 1;
  }
  return { level, row: Math.floor(rest / shapes[level][1]), column: rest % shapes[level][1] };
}

/** The samples of one place: head, level, place and weight of each; over all heads the weights sum to 1. */
export function samplesOf(points, weights, heads, levels) {
  const each = points.length / heads;
  return points.map(([x, y], i) => ({
    x, y, head: Math.floor(i / each), level: Math.floor(((i % each) * levels) / each),
    weight: weights[Math.floor(i / each)][i % each] / heads,
  }));
}

/** Whether a box holds a point. */
export function holds(box, { x, y }) {
  const [x0, y0, x1, y1] = corners(box);
  return x >= x0 && x <= x1 && y >= y0 && y <= y1;
}

/** Of some samples: their weight, their mean distance from a point by weight, how many a box holds, how many lie outside. */
export function summed(samples, [px, py], box) {
  const weight = samples.reduce((sum, one) => sum + one.weight, 0);
  const far = samples.reduce((sum, one) => sum + one.weight * Math.hypot(one.x - px, one.y - py), 0);
  return {
    weight, distance: far / weight, inside: samples.filter((one) => holds(box, one)).length,
    outside: samples.filter((one) => !holds([0.5, 0.5, 1, 1], one)).length,
  };
}
