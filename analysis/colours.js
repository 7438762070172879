"use strict";
// Figures name colours as var(--blue); Plotly wants values. Stands before the script of a page.
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
