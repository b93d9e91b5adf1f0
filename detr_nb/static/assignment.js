// Who belongs to whom: the costs of a pair, and three ways to pick pairs from a table of costs.

import { measures } from "./geometry.js";

/** The cost of every prediction (rows) with every target (columns), as in detr_nb.matcher.
 *
 * A prediction has `box` and `probabilities`, one for each class; a target has `box` and `label`.
 */
export function costTable(predictions, targets, { classWeight, l1Weight, giouWeight }) {
  return predictions.map((prediction) =>
    targets.map((target) => {
      const { l1, giou } = measures(prediction.box, target.box);
      return l1Weight * l1 - giouWeight * giou - classWeight * prediction.probabilities[target.label];
    }),
  );
}

/** The sum of the costs of chosen pairs of row and column. */
export function priceOf(cost, pairs) {
  return pairs.reduce((sum, [row, column]) => sum + cost[row][column], 0);
}

const byRow = (pairs) => pairs.sort((a, b) => a[0] - b[0]);
const transposed = (cost) => cost[0].map((_, column) => cost.map((row) => row[column]));

/** The cheapest one-to-one assignment, as pairs of row and column in the order of rows.
 *
 * Rows are taken in one after the other. For each, the shortest way through the table to a free column is found, where
 * taking a column that is in use means that its row must move on. Prices of rows and columns keep all steps at 0 or more,
 * so that Dijkstra's search is right (Jonker and Volgenant 1987 call it the shortest augmenting path).
 */
export function assign(cost) {
  if (!cost.length || !cost[0].length) return [];
  if (!cost.every((row) => row.every(Number.isFinite))) throw new Error("every cost must be a finite number");
  if (cost.length > cost[0].length) return byRow(assign(transposed(cost)).map(([column, row]) => [row, column]));
  const columns = cost[0].length;
  const [rowPrice, columnPrice] = [new Array(cost.length).fill(0), new Array(columns).fill(0)];
  const owner = new Array(columns).fill(-1); // the row that has a column
  for (let start = 0; start < cost.length; start += 1) {
    const distance = new Array(columns).fill(Infinity);
    const from = new Array(columns).fill(-1); // the column before this one on the way; -1 at the start
    const done = new Array(columns).fill(false);
    let [row, last, reached] = [start, -1, 0];
    while (row >= 0) {
      let next = -1;
      for (let column = 0; column < columns; column += 1) {
        if (done[column]) continue;
        const through = reached + cost[row][column] - rowPrice[row] - columnPrice[column];
        if (through < distance[column]) [distance[column], from[column]] = [through, last];
        if (next < 0 || distance[column] < distance[next]) next = column;
      }
      [done[next], last, reached, row] = [true, next, distance[next], owner[next]];
    }
    rowPrice[start] += reached;
    for (let column = 0; column < columns; column += 1) {
      if (!done[column] || column === last) continue;
      rowPrice[owner[column]] += reached - distance[column];
      columnPrice[column] -= reached - distance[column];
    }
    for (let column = last; column >= 0; column = from[column]) {
      owner[column] = from[column] < 0 ? start : owner[from[column]];
    }
  }
  return byRow(owner.flatMap((row, column) => (row < 0 ? [] : [[row, column]])));
}

/** The cheapest free cell first. Simple, and not always the cheapest in sum. */
export function greedy(cost) {
  const cells = cost.flatMap((row, i) => row.map((value, j) => [value, i, j])).sort((a, b) => a[0] - b[0]);
  const [rows, columns, pairs] = [new Set(), new Set(), []];
  for (const [, row, column] of cells) {
    if (rows.has(row) || columns.has(column)) continue;
    rows.add(row);
    columns.add(column);
    pairs.push([row, column]);
  }
  return byRow(pairs);
}

/** Every assignment there is, tried one by one: only for tests and for small tables. */
export function tryEverything(cost) {
  if (!cost.length || !cost[0].length) return [];
  if (cost[0].length > cost.length) {
    return byRow(tryEverything(transposed(cost)).map(([column, row]) => [row, column]));
  }
  let best = { price: Infinity, pairs: [] };
  const extend = (pairs, price, column) => {
    if (column === cost[0].length) {
      if (price < best.price) best = { price, pairs };
      return;
    }
    cost.forEach((row, i) => {
      if (!pairs.some(([used]) => used === i)) extend([...pairs, [i, column]], price + row[column], column + 1);
    });
  };
  extend([], 0, 0);
  return byRow(best.pairs);
}
