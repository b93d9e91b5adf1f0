// What happens to object queries while a model learns; pure functions of the recorded frames.

/** For each object: has it another query than in the frame before? In the first frame none has. */
export function changed(frames, place) {
  const now = frames[place].matched;
  return now.map((query, object) => place > 0 && frames[place - 1].matched[object] !== query);
}

/** The centres of a query's box from the first frame to the one at `place`. */
export function trail(frames, query, place) {
  return frames.slice(0, place + 1).map((frame) => frame.boxes[query].slice(0, 2));
}

/** How many queries are at least so sure. */
export function sure(frame, threshold) {
  return frame.scores.filter((score) => score >= threshold).length;
}
