"use strict";
// The page contains everything, and shows it all at once where scripts are off. With this script, the reader chooses
// what is shown. Text is set as text, never as markup.
(() => {
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];
  const one = (selector, within = document) => within.querySelector(selector);
  const data = JSON.parse(one("#data").textContent);

  /** Sets `range` to the position at which `surface` is dragged or tapped or, with `hover`, pointed at. */
  function drag(surface, range, hover = false) {
    const follow = (event) => {
      const box = surface.getBoundingClientRect();
      range.value = (range.max * (event.clientX - box.left)) / box.width;
      range.dispatchEvent(new Event("input"));
    };
    surface.addEventListener("pointerdown", (event) => surface.setPointerCapture(event.pointerId));
    surface.addEventListener("pointermove", (event) => {
      if (surface.hasPointerCapture(event.pointerId) || (hover && event.pointerType === "mouse")) follow(event);
    });
    surface.addEventListener("click", follow);
  }

  /** Shows "before" on the left and "after" on the right in every stage of `widget`. */
  function divide(widget) {
    const range = one(".divide", widget);
    const show = () => {
      widget.style.setProperty("--at", `${range.value}%`);
      widget.classList.toggle("whole", range.value === "0" || range.value === "100");
      range.setAttribute("aria-valuetext", `${range.value}% ${range.dataset.left}`);
    };
    range.addEventListener("input", show);
    for (const stage of all(".stage", widget)) drag(stage, range);
    show();
  }

  /** Of the stacked images in each stage, shows number `index`. */
  function pick(widget, index) {
    for (const image of all("[data-pick]", widget)) {
      image.classList.toggle("shown", image.dataset.pick === String(index));
    }
  }

  function reconstructions() {
    const widget = one("#compare");
    divide(widget);
    for (const radio of all("[type=radio]", widget)) {
      radio.addEventListener("change", () => {
        pick(widget, radio.value);
        one(".tag.end", widget).textContent = radio.dataset.name;
      });
    }
  }

  function edits() {
    for (const block of all(".edit-block")) {
      divide(block);
      const strength = one(".strength", block);
      const names = all(".head[data-strength]", block).map((head) => head.dataset.strength);
      strength?.addEventListener("input", () => {
        pick(block, strength.value);
        one("output", block).textContent = names[strength.value];
        strength.setAttribute("aria-valuetext", names[strength.value]);
      });
    }
    const side = one("#side-by-side");
    side?.addEventListener("change", () => {
      for (const table of all(".edit")) table.classList.toggle("side", side.checked);
      for (const sliders of all(".sliders")) sliders.hidden = side.checked;
    });
  }

  /** Keeps the map, the panel of the current segment, the table and the thresholds in the same state. */
  function layers() {
    const map = one("#map");
    const regions = all("[data-segment]", map);
    const rows = all("#segments tbody tr");
    const panel = one("#segment");
    const tiles = all(".strip > li");
    const range = one("#threshold");
    const back = one("#back");
    let current = 0;
    let state = data.thresholds[range ? Number(range.value) : 0];
    // As in Python, layers are chosen in single precision.
    const isAbove = (cell) => Math.fround(Number(cell.dataset.mean)) > Math.fround(state.value);

    function showSegment(index) {
      current = index;
      const row = rows[index];
      const layer = state.layers[index];
      const cells = all("[data-mean]", row);
      for (const halo of all(".halo", map)) halo.setAttribute("href", `#region-${index}`);
      rows.forEach((other, i) => other.classList.toggle("current", i === index));
      regions.forEach((region, i) => {
        region.setAttribute("aria-selected", String(i === index));
        region.setAttribute("tabindex", i === index ? "0" : "-1");
      });
      one(".title", panel).textContent = row.dataset.name;
      one(".share", panel).textContent = row.dataset.share;
      const chip = one(".chip", panel);
      chip.textContent = data.layers[layer];
      chip.dataset.layer = layer;
      all(".bars li", panel).forEach((bar, i) => {
        bar.classList.toggle("chosen", i === layer);
        one("i", bar).style.width = one("i", cells[i]).style.width;
        one(".value", bar).textContent = cells[i].dataset.text;
      });
      one(".why", panel).textContent = "forced" in row.dataset
        ? `${data.layers[layer]} was chosen by hand, regardless of the threshold.`
        : isAbove(cells[layer])
        ? `No layer's error is at most the threshold of ${state.text}, so the last layer is used.`
        : `${data.layers[layer]} is the first layer whose error is at most the threshold of ${state.text}.`;
    }

    function showThreshold(index) {
      state = data.thresholds[index];
      rows.forEach((row, i) => {
        const layer = state.layers[i];
        const cells = all("[data-mean]", row);
        row.dataset.layer = layer;
        const chip = one(".chip", row);
        chip.textContent = data.layers[layer];
        chip.dataset.layer = layer;
        cells.forEach((cell, j) => { cell.className = j === layer ? "chosen" : isAbove(cell) ? "above" : "below"; });
        one(".last", row).hidden = !isAbove(cells[layer]);
        regions[i].dataset.layer = layer;
      });
      for (const place of all(".threshold-text")) place.textContent = state.text;
      all("dl.layers .served").forEach((place, i) => { place.textContent = state.served[i].text; });
      all("#shares i").forEach((part, i) => { part.style.width = `${100 * state.served[i].share}%`; });
      panel.style.setProperty("--threshold", state.place);
      pick(one("#layers-at"), index);
      for (const place of all("#layers-at .lpips")) place.textContent = state.lpips ?? "–";
      one("#shares-text").textContent = state.summary;
      range.value = index;
      range.setAttribute("aria-valuetext", state.text);
      back.disabled = state.own;
      for (const tile of tiles) tile.removeAttribute("aria-current");
      tiles[index].setAttribute("aria-current", "true");
      showSegment(current);
    }

    const last = regions.length - 1;
    const moves = {
      ArrowRight: (i) => i + 1, ArrowDown: (i) => i + 1, ArrowLeft: (i) => i - 1, ArrowUp: (i) => i - 1,
      Home: () => 0, End: () => last,
    };
    map.setAttribute("role", "listbox");
    map.setAttribute("aria-label", "Segments, the largest first");
    map.setAttribute("aria-describedby", "map-hint");
    regions.forEach((region, i) => {
      one("title", region).remove(); // the panel has more
      region.setAttribute("role", "option");
      region.setAttribute("aria-label", rows[i].dataset.name);
      region.addEventListener("click", () => region.focus({ preventScroll: true }));
      region.addEventListener("focus", () => showSegment(i));
      region.addEventListener("keydown", (event) => {
        if (!(event.key in moves)) return;
        event.preventDefault();
        regions[Math.min(last, Math.max(0, moves[event.key](i)))].focus();
      });
      for (const pointed of [region, rows[i]]) {
        // Not "pointerenter", which also fires when the page scrolls under a resting pointer.
        pointed.addEventListener("pointermove", () => { if (current !== i) showSegment(i); });
      }
      rows[i].addEventListener("click", () => showSegment(i));
    });
    range?.addEventListener("input", () => showThreshold(Number(range.value)));
    tiles.forEach((tile, i) => tile.addEventListener("click", () => showThreshold(i)));
    back?.addEventListener("click", () => {
      showThreshold(Number(range.defaultValue));
      range.focus({ preventScroll: true });
    });
    if (regions.length) showSegment(0);
    panel.style.setProperty("--threshold", state.place);
  }

  function losses() {
    const range = one("#step");
    if (!range) return;
    const values = all(".key .value");
    const show = () => {
      const step = Number(range.value);
      const spoken = data.losses.map(({ name, points }, i) => {
        const nearest = points.reduce((a, b) => (Math.abs(b[0] - step) < Math.abs(a[0] - step) ? b : a));
        values[i].textContent = nearest[1];
        return `${name} ${nearest[1]}`;
      });
      one(".chart").style.setProperty("--step", `${(100 * step) / range.max}%`);
      one("#step-text").textContent = step;
      range.setAttribute("aria-valuetext", `step ${step}: ${spoken.join(", ")}`);
    };
    drag(one(".plot"), range, true);
    range.addEventListener("input", show);
    show();
  }

  /** Makes only those elements focusable that do scroll sideways. */
  function scrollers() {
    const watch = new ResizeObserver((seen) => {
      for (const { target } of seen) target.tabIndex = target.scrollWidth > target.clientWidth ? 0 : -1;
    });
    for (const scroll of all(".scroll")) watch.observe(scroll);
  }

  reconstructions();
  layers();
  edits();
  losses();
  scrollers();
  document.documentElement.classList.add("js"); // last, when every control works
})();
