import assert from "node:assert/strict";
import test from "node:test";

import { changed, sure, trail } from "../../detr_nb/static/changes.js";

const frames = [
  { matched: [3, 1, -1], boxes: [[0.1, 0.2, 1, 1], [0.5, 0.5, 1, 1]], scores: [0.2, 0.5] },
  { matched: [3, 0, 2], boxes: [[0.3, 0.4, 1, 1], [0.6, 0.6, 1, 1]], scores: [0.9, 0.7] },
];

test("nothing has changed in the first frame", () => {
  assert.deepEqual(changed(frames, 0), [false, false, false]);
});

test("an object has changed if its query has", () => {
  assert.deepEqual(changed(frames, 1), [false, true, true]);
});

test("a trail has the centres up to now", () => {
  assert.deepEqual(trail(frames, 0, 0), [[0.1, 0.2]]);
  assert.deepEqual(trail(frames, 1, 1), [[0.5, 0.5], [0.6, 0.6]]);
});

test("a score at the threshold counts", () => {
  assert.equal(sure(frames[0], 0.5), 1);
  assert.equal(sure(frames[1], 0.5), 2);
});
