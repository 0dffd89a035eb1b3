// Okabe and Ito's colors, which color-blind readers can tell apart; numbers stand beside them wherever they are used.

const PALETTE = ["#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#9A9A9A"];
const LINES = ["#C17F00", "#3A94CC", "#008F68", "#9C9100", "#0072B2", "#D55E00", "#B65F90", "#7C7C7C"];

export const fill = (stream) => PALETTE[stream % PALETTE.length];
export const line = (stream) => LINES[stream % LINES.length];

export function tint(stream, weight, numStreams) {
  const least = 1 / numStreams;
  const strength = Math.max(0, Math.min(1, (weight - least) / (1 - least)));
  const strongest = Number(getComputedStyle(document.documentElement).getPropertyValue("--strongest"));
  const alpha = strongest * (0.25 + 0.75 * Math.sqrt(strength));
  const [red, green, blue] = [1, 3, 5].map((start) => parseInt(fill(stream).slice(start, start + 2), 16));
  return `rgba(${red}, ${green}, ${blue}, ${alpha.toFixed(3)})`;
}
