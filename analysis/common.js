"use strict";
// What the pages share; stands before the script of each.

// Figures name colours as var(--blue); Plotly wants values.
const resolve = (value, style) => {
  if (typeof value === "string") {
    return value.replace(/var\((--[a-z]+)\)/g, (_, name) => style.getPropertyValue(name).trim());
  }
  if (Array.isArray(value)) return value.map((item) => resolve(item, style));
  if (value && typeof value === "object") {
    return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, resolve(item, style)]));
  }
  return value;
};

// A sheet of slices holds frames below each other, of which its window shows one: at this share of the depth.
const leafTo = (box, depth) => {
  const slider = box.querySelector("input");
  const words = box.querySelector(".at");
  const frames = Number(slider.max);
  const frame = Math.min(frames - 1, Math.floor(depth * frames));
  slider.value = frame + 1;
  words.textContent = `slice ${frame + 1} of ${frames}, ${Math.round((100 * (frame + 0.5)) / frames)} %`;
  slider.setAttribute("aria-valuetext", words.textContent);
  box.querySelector("img").style.transform = `translateY(${(-100 * frame) / frames}%)`;
};
const depthOf = (box) => {
  const slider = box.querySelector("input");
  return (slider.value - 0.5) / slider.max;
};
