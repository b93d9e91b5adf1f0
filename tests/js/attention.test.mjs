import assert from "node:assert/strict";
import test from "node:test";

import { shares, softmax, spreadOf } from "../../detr_nb/static/attention.js";

const near = (a, b, tolerance = 1e-9) => assert.ok(Math.abs(a - b) <= tolerance, `${a} is not ${b}`);
const sum = (numbers) => numbers.reduce((total, x) => total + x, 0);

test("shares sum to one, also for huge scores", () => {
  near(sum(softmax([1, 2, 3])), 1);
  near(sum(softmax([1000, -1000, 999])), 1);
});

test("no strength gives equal shares, much strength chooses", () => {
  const keys = [[1, 0], [0, 1], [0.5, 0.5]];
  for (const share of shares([1, 0], keys, 1, 0)[0]) near(share, 1 / 3);
  assert.ok(shares([1, 0], keys, 1, 100)[0][0] > 0.999);
});

test("heads see their own part of the width", () => {
  const [first, second] = shares([1, 1], [[3, 0], [0, 3]], 2, 1);
  assert.ok(first[0] > first[1] && second[1] > second[0]);
});

test("the spread counts keys", () => {
  near(spreadOf([0.25, 0.25, 0.25, 0.25]), 4);
  near(spreadOf([1, 0, 0]), 1);
});
