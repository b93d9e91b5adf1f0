// What other detectors need and DETR does without: of boxes that overlap, keep the one with the highest score.

import { measures } from "./geometry.js";

/** The places of the boxes that non-maximum suppression keeps, best score first; only boxes of one class compete. */
export function suppress(boxes, scores, labels, threshold) {
  const order = scores.map((_, place) => place).sort((a, b) => scores[b] - scores[a]);
  const kept = [];
  for (const place of order) {
    const rival = (other) =>
      labels[other] === labels[place] && measures(boxes[other], boxes[place]).iou > threshold;
    if (!kept.some(rival)) kept.push(place);
  }
  return kept;
}
