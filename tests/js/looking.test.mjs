import assert from "node:assert/strict";
import test from "node:test";

import { cellAt, meanDistance, middleOf, shareInside } from "../../detr_nb/static/looking.js";

test("cells are counted row by row, and a middle lies in its own cell", () => {
  assert.deepEqual(middleOf(0, 2, 4), [0.125, 0.25]);
  assert.deepEqual(middleOf(7, 2, 4), [0.875, 0.75]);
  for (let cell = 0; cell < 8; cell += 1) {
    const [row, column] = cellAt(...middleOf(cell, 2, 4), 2, 4);
    assert.equal(row * 4 + column, cell);
  }
});

test("a point outside belongs to the nearest cell", () => {
  assert.deepEqual(cellAt(-0.5, 7, 2, 4), [1, 0]);
  assert.deepEqual(cellAt(1, 1, 2, 4), [1, 3]);
});

test("a box holds the attention on the cells whose middle it has", () => {
  const weights = [0.5, 0.25, 0.125, 0.125];
  assert.equal(shareInside(weights, [0.5, 0.5, 1, 1], 2, 2), 1);
  assert.equal(shareInside(weights, [0.25, 0.5, 0.5, 1], 2, 2), 0.625);
  assert.equal(shareInside(weights, [0.5, 0.5, 0.4, 0.4], 2, 2), 0);
});

test("attention on one cell is as far away as the cell", () => {
  assert.equal(meanDistance([0, 0, 0, 1], [0.75, 0.75], 2, 2), 0);
  assert.equal(meanDistance([1, 0, 0, 1], [0.75, 0.25], 2, 2), 1);
});
