// Boxes as in detr_nb.boxes: centre and size (cx, cy, w, h) as shares of the image, y downwards.

const SMALLEST_AREA = 1e-12; // keeps 0 / 0 finite

/** The two corners (x0, y0, x1, y1) of a box. */
export function corners([cx, cy, w, h]) {
  return [cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2];
}

/** Centre and size of a box given by its corners. */
export function fromCorners([x0, y0, x1, y1]) {
  return [(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0];
}

/** The corners of what two boxes share, given and returned as corners; null where they share nothing. */
export function sharedPart(a, b) {
  const [x0, y0, x1, y1] = [...[0, 1].map((j) => Math.max(a[j], b[j])), ...[2, 3].map((j) => Math.min(a[j], b[j]))];
  return x1 > x0 && y1 > y0 ? [x0, y0, x1, y1] : null;
}

/** The corners of the smallest box around two boxes, given as corners. */
export function hullOf(a, b) {
  return [...[0, 1].map((j) => Math.min(a[j], b[j])), ...[2, 3].map((j) => Math.max(a[j], b[j]))];
}

const areaOf = ([x0, y0, x1, y1]) => (x1 - x0) * (y1 - y0);
const shareOf = (part, whole) => part / Math.max(whole, SMALLEST_AREA);

/** IoU, GIoU and L1 of two boxes. */
export function measures(prediction, target) {
  const [a, b] = [corners(prediction), corners(target)];
  const part = sharedPart(a, b);
  const shared = part ? areaOf(part) : 0;
  const union = areaOf(a) + areaOf(b) - shared;
  const hull = areaOf(hullOf(a, b));
  const iou = shareOf(shared, union);
  const l1 = prediction.reduce((sum, x, j) => sum + Math.abs(x - target[j]), 0);
  return { iou, giou: iou - shareOf(hull - union, hull), l1 };
}

// The slope of max(x, y) by x; half where they are equal, as in PyTorch.
const slopeOfMax = (x, y) => (x > y ? 1 : x < y ? 0 : 0.5);

// The slope of a share by each corner, from those of its part and its whole.
function slopeOfShare(part, whole, dPart, dWhole) {
  const safe = Math.max(whole, SMALLEST_AREA);
  const passes = whole >= SMALLEST_AREA ? 1 : 0;
  return dPart.map((d, j) => (d - (passes * part * dWhole[j]) / safe) / safe);
}

// The slopes of an area by its corners, where each corner moves with the slope `moves`.
const slopeOfArea = ([x0, y0, x1, y1], moves) =>
  [y0 - y1, x0 - x1, y1 - y0, x1 - x0].map((length, j) => length * moves[j]);

/** The slopes of 1 - IoU, 1 - GIoU and L1 by the four numbers of the prediction. */
export function slopes(prediction, target) {
  const [a, b] = [corners(prediction), corners(target)];
  const inner = [0, 1, 2, 3].map((j) => (j < 2 ? Math.max(a[j], b[j]) : Math.min(a[j], b[j])));
  const outer = hullOf(a, b);
  const takesInner = a.map((x, j) => (j < 2 ? slopeOfMax(x, b[j]) : slopeOfMax(-x, -b[j])));
  const takesOuter = a.map((x, j) => (j < 2 ? slopeOfMax(-x, -b[j]) : slopeOfMax(x, b[j])));
  // No negative widths: a side of the shared part that is cut off at 0 has no slope.
  const alive = [0, 1].map((j) => inner[j + 2] - inner[j] > 0);
  const cut = [inner[0], inner[1], alive[0] ? inner[2] : inner[0], alive[1] ? inner[3] : inner[1]];
  const shared = areaOf(cut);
  const dShared = slopeOfArea(cut, takesInner.map((slope, j) => (alive[j % 2] ? slope : 0)));
  const union = areaOf(a) + areaOf(b) - shared;
  const dUnion = slopeOfArea(a, [1, 1, 1, 1]).map((d, j) => d - dShared[j]);
  const hull = areaOf(outer);
  const dHull = slopeOfArea(outer, takesOuter);
  const dIou = slopeOfShare(shared, union, dShared, dUnion);
  const dEmpty = slopeOfShare(hull - union, hull, dHull.map((d, j) => d - dUnion[j]), dHull);
  const byCentre = ([x0, y0, x1, y1]) => [x0 + x1, y0 + y1, (x1 - x0) / 2, (y1 - y0) / 2];
  return {
    iou: byCentre(dIou.map((d) => 0 - d)),
    giou: byCentre(dIou.map((d, j) => dEmpty[j] - d)),
    l1: prediction.map((x, j) => Math.sign(x - target[j])),
  };
}

/** A box of at least `least` that lies inside the image. */
export function keepInside([cx, cy, w, h], least = 0.03) {
  const size = [w, h].map((s) => Math.min(1, Math.max(least, s)));
  const centre = [cx, cy].map((c, j) => Math.min(1 - size[j] / 2, Math.max(size[j] / 2, c)));
  return [...centre, ...size];
}

/** One step of at most `length` down the slope of a loss ("iou", "giou" or "l1"); shorter if that would go up. */
export function stepDown(prediction, target, loss, length = 0.02) {
  const value = (box) => (loss === "l1" ? measures(box, target).l1 : 1 - measures(box, target)[loss]);
  const slope = slopes(prediction, target)[loss];
  const norm = Math.hypot(...slope);
  if (norm < 1e-9) return prediction;
  for (let tries = 0; tries < 8; tries += 1, length /= 2) {
    const next = keepInside(prediction.map((x, j) => x - (length * slope[j]) / norm));
    if (value(next) < value(prediction) - 1e-9) return next;
  }
  return prediction;
}
