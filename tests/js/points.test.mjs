import assert from "node:assert/strict";
import test from "node:test";

import { cellIn, holds, rowsOf, samplesOf, summed, unpackNumbers } from "../../detr_nb/static/points.js";

test("two bytes are a number between the ends", () => {
  const text = btoa(String.fromCharCode(0, 0, 255, 255));
  assert.deepEqual(unpackNumbers({ low: -1, high: 2, text }), [-1, 2]);
});

test("cells are counted level by level, row by row", () => {
  const shapes = [[2, 3], [1, 2]];
  assert.deepEqual(cellIn(shapes, 0), { level: 0, row: 0, column: 0 });
  assert.deepEqual(cellIn(shapes, 5), { level: 0, row: 1, column: 2 });
  assert.deepEqual(cellIn(shapes, 7), { level: 1, row: 0, column: 1 });
});

test("samples know their head and level, and weights of all heads sum to one", () => {
  const points = rowsOf([0, 0, 0.1, 0.1, 0.2, 0.2, 0.3, 0.3], 2);
  const samples = samplesOf(points, [[0.25, 0.75], [1, 0]], 2, 2);
  assert.deepEqual(samples.map(({ head, level }) => [head, level]), [[0, 0], [0, 1], [1, 0], [1, 1]]);
  assert.equal(samples.reduce((sum, one) => sum + one.weight, 0), 1);
});

test("a sample counts by its weight, a point beyond the picture is outside", () => {
  const samples = [{ x: 0.5, y: 0.5, weight: 0.5 }, { x: 1.5, y: 0.5, weight: 0.5 }];
  assert.deepEqual(summed(samples, [0.5, 0.5], [0.5, 0.5, 0.2, 0.2]), { weight: 1, distance: 0.5, inside: 1, outside: 1 });
  assert.equal(holds([0.5, 0.5, 1, 1], { x: 1, y: 0 }), true);
});
