import assert from "node:assert/strict";
import test from "node:test";

import {
  corners, fromCorners, hullOf, keepInside, measures, sharedPart, slopes, stepDown,
} from "../../detr_nb/static/geometry.js";

const near = (a, b, tolerance = 1e-9) => assert.ok(Math.abs(a - b) <= tolerance, `${a} is not ${b}`);
const randomBox = () => {
  const [w, h] = [0.05 + 0.5 * Math.random(), 0.05 + 0.5 * Math.random()];
  return [w / 2 + (1 - w) * Math.random(), h / 2 + (1 - h) * Math.random(), w, h];
};

test("corners and back", () => {
  assert.deepEqual(corners([0.5, 0.5, 0.5, 0.25]), [0.25, 0.375, 0.75, 0.625]);
  assert.deepEqual(fromCorners([0.25, 0.375, 0.75, 0.625]), [0.5, 0.5, 0.5, 0.25]);
});

test("half beside itself shares a third", () => near(measures([1, 1, 2, 2], [2, 1, 2, 2]).iou, 1 / 3));

test("equal boxes are perfect, distant ones have a hull that is empty", () => {
  assert.deepEqual(measures([0.5, 0.5, 0.5, 0.5], [0.5, 0.5, 0.5, 0.5]), { iou: 1, giou: 1, l1: 0 });
  const { iou, giou } = measures([0.25, 0.3, 0.3, 0.3], [0.75, 0.7, 0.2, 0.2]);
  assert.equal(iou, 0);
  near(giou, -(0.4875 - 0.13) / 0.4875);
});

test("two equal points give numbers", () => {
  const point = [0.5, 0.5, 0, 0];
  assert.deepEqual(measures(point, point), { iou: 0, giou: 0, l1: 0 });
  for (const slope of Object.values(slopes(point, point))) assert.ok(slope.every(Number.isFinite));
});

test("shared part and hull", () => {
  assert.deepEqual(sharedPart([0, 0, 2, 2], [1, 1, 3, 3]), [1, 1, 2, 2]);
  assert.equal(sharedPart([0, 0, 1, 1], [1, 0, 2, 1]), null);
  assert.deepEqual(hullOf([0, 0, 1, 1], [2, 3, 4, 5]), [0, 0, 4, 5]);
});

test("slopes are those of small differences", () => {
  const h = 1e-6;
  for (let turn = 0; turn < 200; turn += 1) {
    const [prediction, target] = [randomBox(), randomBox()];
    const slope = slopes(prediction, target);
    for (let j = 0; j < 4; j += 1) {
      const moved = (by) => measures(prediction.map((x, k) => (k === j ? x + by : x)), target);
      const by = (name) => (moved(h)[name] - moved(-h)[name]) / (2 * h);
      near(slope.iou[j], -by("iou"), 1e-4);
      near(slope.giou[j], -by("giou"), 1e-4);
      near(slope.l1[j], by("l1"), 1e-4);
    }
  }
});

test("boxes that do not touch have no slope of IoU, a target inside gives GIoU no slope by the centre", () => {
  assert.deepEqual(slopes([0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]).iou.map(Math.abs), [0, 0, 0, 0]);
  const around = slopes([0.5, 0.5, 0.8, 0.8], [0.45, 0.5, 0.2, 0.2]).giou;
  near(around[0], 0);
  near(around[1], 0);
});

test("a box is kept inside the image and not too small", () => {
  assert.deepEqual(keepInside([2, -1, 0.5, 0], 0.1), [0.75, 0.05, 0.5, 0.1]);
  for (const edge of corners(keepInside([0.99, 0.5, 3, 0.2]))) assert.ok(edge >= 0 && edge <= 1);
});

test("walking down the slope of GIoU ends on the target, that of IoU stays where boxes do not touch", () => {
  let [box, target] = [[0.2, 0.2, 0.2, 0.2], [0.7, 0.6, 0.3, 0.4]];
  assert.equal(stepDown(box, target, "iou"), box);
  for (let turn = 0; turn < 300; turn += 1) {
    const next = stepDown(box, target, "giou");
    assert.ok(measures(next, target).giou >= measures(box, target).giou);
    box = next;
  }
  assert.ok(measures(box, target).iou > 0.9, `stopped at ${box}`);
});
