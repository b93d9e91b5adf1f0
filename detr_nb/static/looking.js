// What attention over a grid of cells says in numbers; points and boxes are shares of the image.

import { corners } from "./geometry.js";

/** The middle (x, y) of a cell; cells are counted row by row. */
export function middleOf(cell, rows, columns) {
  return [((cell % columns) + 0.5) / columns, (Math.floor(cell / columns) + 0.5) / rows];
}

/** Row and column of the cell that holds a point, or of the nearest to a point outside. */
export function cellAt(x, y, rows, columns) {
  const within = (value, count) => Math.min(count - 1, Math.max(0, Math.floor(value * count)));
  return [within(y, rows), within(x, columns)];
}

/** How much of the attention lies on cells whose middle is in a box. */
export function shareInside(weights, box, rows, columns) {
  const [x0, y0, x1, y1] = corners(box);
  return weights.reduce((sum, weight, cell) => {
    const [x, y] = middleOf(cell, rows, columns);
    return sum + (x >= x0 && x <= x1 && y >= y0 && y <= y1 ? weight : 0);
  }, 0);
}

/** How far from a point the attention lies on average. */
export function meanDistance(weights, [px, py], rows, columns) {
  return weights.reduce((sum, weight, cell) => {
    const [x, y] = middleOf(cell, rows, columns);
    return sum + weight * Math.hypot(x - px, y - py);
  }, 0);
}
