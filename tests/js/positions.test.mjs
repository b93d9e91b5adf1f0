import assert from "node:assert/strict";
import test from "node:test";

import { addresses, angleOf, similarities, sineEmbedding } from "../../detr_nb/static/positions.js";

const near = (a, b, tolerance = 1e-9) => assert.ok(Math.abs(a - b) <= tolerance, `${a} is not ${b}`);

test("the first two channels turn fastest", () => {
  const [sine, cosine, slowSine] = sineEmbedding(1, 4, 100);
  near(sine, Math.sin(1));
  near(cosine, Math.cos(1));
  near(slowSine, Math.sin(0.1));
});

test("the last row makes a full turn", () => near(angleOf(7, 8), 2 * Math.PI, 1e-5));

test("every cell is most similar to itself, and similarity knows the distance only", () => {
  const table = addresses(6, 8, 32, 20);
  assert.equal(table.length, 48);
  const own = similarities(table, 19);
  near(own[19], 1);
  assert.ok(own.every((value, cell) => cell === 19 || value < 1));
  near(similarities(table, 0)[9], similarities(table, 18)[27], 1e-6); // one down and one to the right
});

test("a higher temperature blurs", () => {
  const least = (temperature) => Math.min(...similarities(addresses(8, 8, 64, temperature), 27));
  assert.ok(least(20) < 0.5 && least(10000) > 0.7);
});
