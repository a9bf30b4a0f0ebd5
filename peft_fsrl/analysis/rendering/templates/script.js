"use strict";
(() => {
  const known = JSON.parse(document.getElementById("known").textContent);
  const tip = document.getElementById("tip");
  let shown = null;

  function cell(row, text, kind) {
    const made = row.insertCell();
    made.textContent = text;
    if (kind) made.className = kind;
    else made.dir = "auto";
  }

  function fill(token) {
    const pairs = token.dataset.steered.trim().split(" ").filter(Boolean);
    const total = Number(token.dataset.n);
    const line = document.createElement("p");
    line.textContent = total === 1 ? "1 feature steered here" : `${total} features steered here`;
    if (pairs.length < total) line.textContent += `, the strongest ${pairs.length}:`;
    const table = document.createElement("table");
    for (const pair of pairs) {
      const [feature, value] = pair.split(":");
      const row = table.insertRow();
      cell(row, feature, "n");
      cell(row, value.startsWith("\u2212") ? value : `+${value}`, "n");
      cell(row, known[feature] ?? "", "");
    }
    tip.replaceChildren(line, table);
  }

  function show(token) {
    if (shown === token) return;
    hide();
    shown = token;
    fill(token);
    tip.hidden = false;
    token.setAttribute("aria-describedby", "tip");
    const place = token.getClientRects()[0] ?? token.getBoundingClientRect();
    const room = document.documentElement.clientWidth;
    const left = Math.max(8, Math.min(place.left, room - tip.offsetWidth - 8));
    const below = place.bottom + 2;
    const fits = below + tip.offsetHeight < window.innerHeight || place.top < tip.offsetHeight;
    tip.style.left = `${left + window.scrollX}px`;
    tip.style.top = `${(fits ? below : place.top - tip.offsetHeight - 2) + window.scrollY}px`;
  }

  function hide() {
    if (shown) shown.removeAttribute("aria-describedby");
    shown = null;
    tip.hidden = true;
  }

  const tokenOf = (target) => (target instanceof Element ? target.closest(".token") : null);

  document.addEventListener("pointerover", (event) => {
    const token = tokenOf(event.target);
    if (token) show(token);
    else if (!tip.contains(event.target) && shown !== document.activeElement) hide();
  });
  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event.target);
    if (token) show(token);
    else hide();
  });
  document.addEventListener("focusout", hide);
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") return hide();
    const token = tokenOf(event.target);
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: 1, ArrowUp: -1 }[event.key];
    if (!token || !step) return undefined;
    const all = [...token.parentElement.querySelectorAll(".token")];
    const next = all[all.indexOf(token) + step];
    if (next) next.focus();
    return event.preventDefault();
  });

  const button = document.getElementById("theme");
  const themes = ["automatic", "light", "dark"];
  button.hidden = false;
  button.addEventListener("click", () => {
    const label = button.querySelector("span");
    const next = themes[(themes.indexOf(label.textContent) + 1) % themes.length];
    label.textContent = next;
    if (next === "automatic") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = next;
  });

  const closed = [];
  window.addEventListener("beforeprint", () => {
    for (const part of document.querySelectorAll("details:not([open])")) {
      closed.push(part);
      part.open = true;
    }
  });
  window.addEventListener("afterprint", () => {
    while (closed.length) closed.pop().open = false;
  });
})();
