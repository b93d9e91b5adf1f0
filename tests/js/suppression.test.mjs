import assert from "node:assert/strict";
import test from "node:test";

import { suppress } from "../../detr_nb/static/suppression.js";

const [box, near, far] = [[0.5, 0.5, 0.4, 0.4], [0.52, 0.5, 0.4, 0.4], [0.1, 0.1, 0.1, 0.1]];

test("of two boxes on one object the better one stays", () => {
  assert.deepEqual(suppress([box, near, far], [0.6, 0.9, 0.3], [0, 0, 0], 0.5), [1, 2]);
});

test("boxes of different classes do not compete", () => {
  assert.deepEqual(suppress([box, near], [0.6, 0.9], [0, 1], 0.5), [1, 0]);
});

test("a struck box strikes no other", () => {
  const row = [0.3, 0.4, 0.5].map((x) => [x, 0.5, 0.4, 0.4]); // neighbours overlap by 0.6, the outer two by a third
  assert.deepEqual(suppress(row, [0.9, 0.8, 0.7], [0, 0, 0], 0.5), [0, 2]);
});

test("nothing stays nothing", () => assert.deepEqual(suppress([], [], [], 0.5), []));
