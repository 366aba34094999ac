"use strict";
(() => {
  // What cells and marks say, on hover and when they have the focus.
  const tip = document.getElementById("tip");
  const said = (item) => {
    if (item.hasAttribute("aria-label")) return item.getAttribute("aria-label");
    const table = item.closest("table"), row = item.parentElement;
    const parts = {
      row: row.cells[0].textContent, column: table.tHead.rows[0].cells[item.cellIndex].textContent, value: item.textContent,
    };
    return table.dataset.says.replace(/{(\w+)}/g, (_, name) => parts[name]);
  };
  const show = (item) => {
    tip.textContent = said(item);
    tip.hidden = false;
    const at = item.getBoundingClientRect(), own = tip.getBoundingClientRect();
    const middle = at.left + at.width / 2 - own.width / 2;
    const above = at.top - own.height - 6;
    tip.style.left = Math.max(4, Math.min(middle, document.documentElement.clientWidth - own.width - 4)) + "px";
    tip.style.top = (above > 2 ? above : at.bottom + 6) + "px";
  };
  const hide = () => { tip.hidden = true; };
  const ITEMS = ".pt, td:not(:empty)";
  const itemOf = (target) => {
    const item = target.closest(ITEMS);
    return item && item.closest("[data-grid]") ? item : null;
  };

  // Arrows go from cell to cell and from mark to mark; the Tab key enters a grid where it was left.
  const shown = (element) => !element.classList.contains("off");
  const keyOf = (item) => Number(item.dataset.i ?? item.cellIndex);
  const focus = (grid, item) => {
    for (const old of grid.querySelectorAll("[tabindex='0']")) old.setAttribute("tabindex", "-1");
    item.setAttribute("tabindex", "0");
    item.focus();
  };
  const move = (grid, item, key) => {
    const rows = [...grid.querySelectorAll(".row, tbody tr")].filter((row) => shown(row) && row.querySelector(ITEMS));
    const row = item.closest(".row, tr");
    const own = [...row.querySelectorAll(ITEMS)];
    const across = row.classList.contains("across");
    const along = across ? { ArrowUp: 1, ArrowDown: -1 } : { ArrowRight: 1, ArrowLeft: -1 };
    const beside = across ? { ArrowRight: 1, ArrowLeft: -1 } : { ArrowDown: 1, ArrowUp: -1 };
    if (key === "Home") return own[0];
    if (key === "End") return own[own.length - 1];
    if (key in along) return own[own.indexOf(item) + along[key]];
    if (!(key in beside)) return undefined;
    const next = rows[rows.indexOf(row) + beside[key]];
    if (!next) return undefined;
    const far = (other) => Math.abs(keyOf(other) - keyOf(item));
    return [...next.querySelectorAll(ITEMS)].reduce((a, b) => (far(b) < far(a) ? b : a));
  };
  for (const grid of document.querySelectorAll("[data-grid]")) {
    grid.addEventListener("mouseover", (event) => {
      const item = itemOf(event.target);
      if (item) show(item); else hide();
    });
    grid.addEventListener("mouseleave", hide);
    grid.addEventListener("click", (event) => {
      const item = itemOf(event.target);
      if (item) focus(grid, item);
    });
    grid.addEventListener("focusin", (event) => { if (itemOf(event.target)) show(event.target); });
    grid.addEventListener("focusout", hide);
    grid.addEventListener("keydown", (event) => {
      if (event.key === "Escape") return hide();
      const item = itemOf(event.target);
      if (!item || event.altKey || event.ctrlKey || event.metaKey) return;
      const next = move(grid, item, event.key);
      if (next) focus(grid, next);
      if (next || event.key.startsWith("Arrow")) event.preventDefault();
    });
  }
  addEventListener("scroll", () => {
    const item = itemOf(document.activeElement);
    if (item) show(item); else hide();
  }, true);

  // Buttons of a legend hide and show curves.
  for (const button of document.querySelectorAll(".legend button")) {
    button.addEventListener("click", () => {
      const pressed = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", pressed);
      for (const curve of button.closest("figure").querySelectorAll(".row")) {
        if (curve.dataset.curve === button.dataset.curve) curve.classList.toggle("off", !pressed);
      }
    });
  }

  // Numbers begin with the highest, texts with the first of the alphabet; what has no value stays last.
  for (const button of document.querySelectorAll(".sortable button")) {
    button.addEventListener("click", () => {
      const head = button.closest("th"), table = head.closest("table"), body = table.tBodies[0], place = head.cellIndex;
      const value = (row) => row.cells[place].dataset.v;
      const rows = [...body.rows], known = rows.filter((row) => value(row) !== undefined);
      const numbers = known.every((row) => value(row) !== "" && !Number.isNaN(Number(value(row))));
      const before = head.getAttribute("aria-sort");
      const down = before === "none" ? numbers : before === "ascending";
      const order = (a, b) => (numbers ? value(a) - value(b) : value(a).localeCompare(value(b)));
      known.sort((a, b) => (down ? order(b, a) : order(a, b)));
      for (const other of head.parentElement.cells) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...known, ...rows.filter((row) => value(row) === undefined));
    });
  }
})();
