import assert from "node:assert/strict";
import test from "node:test";

import { assign, costTable, greedy, priceOf, tryEverything } from "../../detr_nb/static/assignment.js";

const randomTable = (rows, columns, draw = () => Math.random() * 4 - 2) =>
  Array.from({ length: rows }, () => Array.from({ length: columns }, draw));
const near = (a, b) => assert.ok(Math.abs(a - b) < 1e-9, `${a} is not ${b}`);

test("as cheap as the cheapest of all assignments, on tables of every shape", () => {
  for (let turn = 0; turn < 400; turn += 1) {
    const cost = randomTable(1 + (turn % 6), 1 + (Math.floor(turn / 6) % 6));
    const pairs = assign(cost);
    near(priceOf(cost, pairs), priceOf(cost, tryEverything(cost)));
    assert.deepEqual(pairs, tryEverything(cost));
  }
});

test("one to one, rows in order, as many pairs as there can be", () => {
  for (const [rows, columns] of [[7, 3], [3, 7], [5, 5], [1, 1]]) {
    const pairs = assign(randomTable(rows, columns));
    assert.equal(pairs.length, Math.min(rows, columns));
    assert.equal(new Set(pairs.map(([row]) => row)).size, pairs.length);
    assert.equal(new Set(pairs.map(([, column]) => column)).size, pairs.length);
    assert.deepEqual(pairs, [...pairs].sort((a, b) => a[0] - b[0]));
  }
});

test("ties and equal costs end", () => {
  const cost = randomTable(5, 4, () => Math.floor(Math.random() * 2));
  near(priceOf(cost, assign(cost)), priceOf(cost, tryEverything(cost)));
  assert.equal(assign(randomTable(4, 4, () => 1)).length, 4);
});

test("nothing to assign, and nothing that could be assigned", () => {
  assert.deepEqual(assign([]), []);
  assert.deepEqual(assign([[], []]), []);
  assert.throws(() => assign([[1, NaN]]), /finite/);
});

test("greed takes the cheapest cell and pays for it", () => {
  const cost = [[0.08, 0.12], [0.2, 0.4]];
  assert.deepEqual(greedy(cost), [[0, 0], [1, 1]]);
  assert.deepEqual(assign(cost), [[0, 1], [1, 0]]);
});

test("greed is never better", () => {
  let worse = 0;
  for (let turn = 0; turn < 200; turn += 1) {
    const cost = randomTable(5, 4);
    const [best, greed] = [priceOf(cost, assign(cost)), priceOf(cost, greedy(cost))];
    assert.ok(greed >= best - 1e-9);
    worse += greed > best + 1e-9;
  }
  assert.ok(worse > 50);
});

test("a perfect pair costs minus the class weight and minus the GIoU weight", () => {
  const box = [0.5, 0.5, 0.2, 0.2];
  const weights = { classWeight: 1, l1Weight: 5, giouWeight: 2 };
  const cost = costTable([{ box, probabilities: [0, 1] }], [{ box, label: 1 }], weights);
  near(cost[0][0], -3);
});
