"use strict";
// The page says everything without this; it adds a theme, series that can be hidden, values of points, sorted tables.
(() => {
  const root = document.documentElement;

  function setUpTheme() {
    const button = document.getElementById("theme");
    const isDark = () => (root.dataset.theme ?? (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light")) === "dark";
    const show = () => { 
      const other = isDark() ? "light" : "dark";
      button.textContent = `\u25d0 ${other}`;
      button.setAttribute("aria-label", `Use the ${other} theme`);
 };
    button.hidden = false;
    button.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; show(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", show);
    show();
  }

  function setUpSeries(figure) {
    const group = figure.querySelector(".series");
    if (!group) return;
    group.hidden = false;
    for (const button of group.querySelectorAll("button")) {
      button.addEventListener("click", () => {
        const isShown = button.getAttribute("aria-pressed") !== "true";
        button.setAttribute("aria-pressed", String(isShown));
        for (const part of figure.querySelectorAll(`[data-series="${button.dataset.toggles}"]`)) {
          part.toggleAttribute("data-hidden", !isShown);
        }
        keepOneTabStop(figure);
      });
    }
  }

  const pointsOf = (figure) => [...figure.querySelectorAll(".point")].filter((point) => !point.closest("[data-hidden]"));

  // One stop for Tab in each picture; arrow keys go from point to point.
  function keepOneTabStop(figure, chosen) {
    const points = pointsOf(figure);
    const current = chosen ?? points.find((point) => point.getAttribute("tabindex") === "0") ?? points[0];
    for (const point of figure.querySelectorAll(".point")) point.setAttribute("tabindex", point === current ? "0" : "-1");
  }

  function setUpPoints(figure, tip) {
    for (const point of figure.querySelectorAll(".point")) {
      point.querySelector("title")?.remove(); // its words are in aria-label; the browser's own tip would be a second one
      point.addEventListener("pointerenter", () => showTip(tip, point));
      point.addEventListener("pointerleave", () => { tip.hidden = true; });
      point.addEventListener("focus", () => { keepOneTabStop(figure, point); showTip(tip, point); });
      point.addEventListener("blur", () => { tip.hidden = true; });
    }
    figure.addEventListener("keydown", (event) => {
      const points = pointsOf(figure);
      const at = points.indexOf(document.activeElement);
      if (at < 0) return;
      if (event.key === "Escape") { tip.hidden = true; return; }
      const last = points.length - 1;
      const to = { ArrowRight: at + 1, ArrowDown: at + 1, ArrowLeft: at - 1, ArrowUp: at - 1, Home: 0, End: last }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      points[Math.min(Math.max(to, 0), last)].focus();
    });
    keepOneTabStop(figure);
  }

  function showTip(tip, point) {
    tip.textContent = point.getAttribute("aria-label");
    tip.hidden = false;
    const box = point.getBoundingClientRect();
    const left = box.left + box.width / 2 - tip.offsetWidth / 2;
    const above = box.top - tip.offsetHeight - 8;
    tip.style.left = `${Math.max(8, Math.min(left, root.clientWidth - tip.offsetWidth - 8))}px`;
    tip.style.top = `${above > 56 ? above : box.bottom + 8}px`;
  }

  function setUpTable(table) {
    const headers = [...table.querySelectorAll("thead th")];
    headers.forEach((header, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.textContent = header.textContent;
      header.replaceChildren(button);
      header.setAttribute("aria-sort", "none");
      button.addEventListener("click", () => {
        const order = header.getAttribute("aria-sort") === "ascending" ? "descending" : "ascending";
        for (const other of headers) other.setAttribute("aria-sort", other === header ? order : "none");
        sortRows(table.tBodies[0], column, order === "ascending" ? 1 : -1);
      });
    });
  }

  // Numbers by size, words by the alphabet; cells without a value stay last.
  function sortRows(body, column, direction) {
    const value = (row) => row.cells[column].dataset.order;
    const compare = (a, b) => (isFinite(a) && isFinite(b) ? a - b : a.localeCompare(b));
    const rows = [...body.rows].sort((x, y) => {
      const [a, b] = [value(x), value(y)];
      if (a === "" || b === "") return (a === "") - (b === "");
      return direction * compare(a, b);
    });
    body.append(...rows);
  }

  const tip = document.getElementById("tip");
  setUpTheme();
  for (const figure of document.querySelectorAll("figure")) {
    setUpSeries(figure);
    setUpPoints(figure, tip);
  }
  // Focus may scroll a point into view: its tip goes along.
  addEventListener("scroll", () => {
    const point = document.querySelector(".point:hover") ?? document.activeElement.closest(".point");
    if (point && !tip.hidden) showTip(tip, point);
    else tip.hidden = true;
  }, { capture: true, passive: true });
  document.querySelectorAll("table").forEach(setUpTable);
})();
