"use strict";
/* Draws what /v1/status says, every two seconds. Text goes in as text and never as markup. */
(() => {
  const POLL_MS = 2000, STALE_MS = 15000, KEY = "preceptor-key";
  const $ = (id) => document.getElementById(id);
  const SVG = "http://www.w3.org/2000/svg";
  let last = null, lastAt = 0, minutes = 60, sort = { by: "share", up: false }, timer = 0, asking = null;

  // ---- text ----------------------------------------------------------------------------------------------------------
  const number = (value) => {
    if (value === null || value === undefined) return "–";
    for (const [size, unit] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
      if (value >= 0.9995 * size) return `${(value / size).toPrecision(3).replace(/\.?0+$/, "")}${unit}`;
    }
    return value >= 100 || Number.isInteger(value) ? String(Math.round(value)) : String(Number(value.toPrecision(2)));
  };
  const bytes = (value) => number(value).replace(/([A-Za-z]?)$/, "\u00a0$1B");
  const seconds = (value) => {
    if (value === null || value === undefined) return "–";
    if (value < 1) return `${Math.max(Math.round(value * 1000), 1)}\u00a0ms`;
    return `${value < 100 ? Number(value.toPrecision(2)) : Math.round(value)}\u00a0s`;
  };
  const percent = (share) => (share > 0 && share < 0.01 ? "<\u00a01\u00a0%" : `${Math.round(100 * share)}\u00a0%`);
  const duration = (value) => {
    const [days, hours, mins] = [Math.floor(value / 86400), Math.floor(value / 3600) % 24, Math.floor(value / 60) % 60];
    return days ? `${days} d ${hours} h` : hours ? `${hours} h ${mins} min` : mins ? `${mins} min` : `${Math.floor(value)} s`;
  };
  const share = (part, whole) => (whole > 0 ? part / whole : 0);
  const words = (kind) => kind.replaceAll("_", " ");
  const put = (id, text) => { if ($(id).textContent !== text) $(id).textContent = text; };
  const element = (name, text, className) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };

  // ---- asking --------------------------------------------------------------------------------------------------------
  const key = () => sessionStorage.getItem(KEY) || "";
  async function ask() {
    clearTimeout(timer);
    if (asking) asking.abort();
    asking = new AbortController();
    const mine = asking, giveUp = setTimeout(() => mine.abort(), 10000);
    try {
      const headers = key() ? { authorization: `Bearer ${key()}` } : {};
      const answer = await fetch("v1/status", { headers, cache: "no-store", signal: mine.signal });
      if (answer.status === 401) return wantKey();
      if (!answer.ok) throw new Error(String(answer.status));
      last = await answer.json();
      lastAt = Date.now();
      $("ask").hidden = true;
      $("page").hidden = false;
      $("forget").hidden = !key();
      $("docs").hidden = Boolean(key()); // a link sends none
      draw();
    } catch (error) {
      if (mine !== asking) return;
      age();
    } finally {
      clearTimeout(giveUp);
    }
    if (!document.hidden) timer = setTimeout(ask, POLL_MS);
  }
  function wantKey() {
    $("wrong").hidden = !key();
    sessionStorage.removeItem(KEY);
    $("page").hidden = true;
    $("ask").hidden = false;
    $("key").value = "";
    $("key").focus();
  }
  function age() {
    const old = Date.now() - lastAt;
    document.body.classList.toggle("stale", last !== null && old > STALE_MS);
    if (last === null) {
      $("page").hidden = false;
      pill("No answer", "bad");
    } else if (old > STALE_MS) {
      pill("No answer", "bad");
      put("seen", `last seen ${duration(old / 1000)} ago`);
    }
  }

  // ---- drawing -------------------------------------------------------------------------------------------------------
  function pill(text, kind) {
    put("state", text);
    $("state").className = `pill ${kind}`;
  }
  function draw() {
    document.body.classList.remove("stale");
    drawHead();
    drawTiles();
    drawCharts();
    drawTenants();
    drawOutcomes();
  }
  function drawHead() {
    const { teacher, state, you } = last;
    const text = state.status.charAt(0).toUpperCase() + state.status.slice(1);
    pill(state.live ? text : "Stalled", state.ready && state.live ? "good" : state.live ? "" : "bad");
    put("model", teacher ? teacher.model : "Loading the model…");
    document.title = `${teacher ? teacher.model : "Teacher"} – ${text}`;
    const facts = teacher
      ? [teacher.engine, teacher.dtype, teacher.quantisation, teacher.scoring_path, `up to ${number(teacher.max_sequence_tokens)} tokens`]
      : [];
    if (teacher && teacher.adapters.length) facts.push(`adapters: ${teacher.adapters.join(", ")}`);
    put("facts", facts.filter(Boolean).join(" · "));
    put("fingerprint", teacher ? teacher.fingerprint : "–");
    $("note").hidden = !(teacher && teacher.note);
    put("note", teacher ? teacher.note : "");
    put("seen", `up ${duration(last.uptime_s)}${you.admin ? "" : ` · shown: tenant ${you.tenant}`}`);
    put("about", `Preceptor ${last.version}`);
  }
  function drawTiles() {
    const { rates, queue, latency_s: latency, hour } = last;
    put("tokens", number(rates.tokens));
    put("tokens-more", `${number(hour.computed_tokens + hour.cached_tokens)} in the last hour`);
    const whole = queue.limit_tokens !== undefined;
    put("queue", whole ? percent(queue.share) : number(queue.tokens));
    put("queue-more", whole ? `${number(queue.tokens)} of ${number(queue.limit_tokens)} tokens` : "tokens of yours in work");
    $("queue-meter").hidden = !whole;
    if (whole) {
      $("queue-meter").firstElementChild.style.width = `${Math.min(100 * queue.share, 100)}%`;
      $("queue-meter").className = `meter ${queue.share > 0.9 ? "bad" : queue.share > 0.7 ? "busy" : ""}`;
    }
    put("p95", seconds(latency.p95));
    put("latency-more", `p50\u00a0${seconds(latency.p50)} · p99\u00a0${seconds(latency.p99)}`);
    put("requests", number(rates.requests));
    put("requests-more", `${number(hour.outcomes.ok || 0)} in the last hour`);
    put("cache", percent(share(hour.cached_tokens, hour.computed_tokens + hour.cached_tokens)));
    const { cache } = last, kept = [];
    if (cache.limit_bytes) kept.push(`${bytes(cache.bytes)} of ${bytes(cache.limit_bytes)}`);
    if (cache.disk_limit_bytes) kept.push(`disk ${bytes(cache.disk_bytes)} of ${bytes(cache.disk_limit_bytes)}`);
    if (!cache.enabled) kept.push("switched off");
    put("cache-more", [`${number(hour.cached_tokens)} tokens spared`, ...kept].join(" · "));
    const refused = Object.entries(hour.outcomes).filter(([kind]) => kind !== "ok").sort((a, b) => b[1] - a[1]);
    put("refused", number(refused.reduce((sum, [, count]) => sum + count, 0)));
    put("refused-more", refused.length ? `most: ${words(refused[0][0])}` : "none in the last hour");
  }
  function drawCharts() {
    const { history } = last;
    chart("throughput", [["computed", "computed", history.computed], ["cached", "from the cache", history.cached]], true);
    chart("waiting", [["computed", "tokens", history.queue_tokens]], false);
    chart("traffic", [["computed", "answered", history.answered], ["bad-line", "refused", history.refused]], true);
  }

  function nice(top) {
    if (!(top > 0)) return 1;
    const size = 10 ** Math.floor(Math.log10(top));
    return [1, 2, 3, 4, 6, 8, 10].find((step) => step * size >= top) * size;
  }
  function chart(id, series, stacked) {
    const svg = $(id), { step_s: step } = last.history, count = Math.max(Math.round((60 * minutes) / step), 2);
    const width = svg.clientWidth || 600, height = svg.clientHeight || 150, left = 38, right = 6, top = 8, bottom = 18;
    const padded = series.map(([, , values]) => {
      const shown = values.slice(-count);
      return [...Array(count - shown.length).fill(null), ...shown];
    });
    const sums = Array.from({ length: count }, (_, i) => padded.map((_, n) => {
      const upto = stacked ? padded.slice(0, n + 1) : [padded[n]];
      return upto.some((values) => values[i] === null) ? null : upto.reduce((sum, values) => sum + values[i], 0);
    }));
    const most = nice(Math.max(...sums.flat().filter((value) => value !== null), 0));
    const x = (i) => left + ((width - left - right) * i) / (count - 1);
    const y = (value) => height - bottom - ((height - top - bottom) * value) / most;
    const parts = [];
    const draw = (name, attributes, text) => {
      const made = document.createElementNS(SVG, name);
      for (const [attribute, value] of Object.entries(attributes)) made.setAttribute(attribute, value);
      if (text !== undefined) made.textContent = text;
      parts.push(made);
      return made;
    };
    for (const part of [0, 0.5, 1]) {
      draw("line", { class: "grid", x1: left, x2: width - right, y1: y(part * most), y2: y(part * most) });
      draw("text", { x: left - 6, y: y(part * most) + 4, "text-anchor": "end" }, number(part * most));
    }
    for (const part of [0, 0.5, 1]) {
      const ago = Math.round(minutes * (1 - part) * 10) / 10;
      const anchor = part === 0 ? "start" : part === 1 ? "end" : "middle";
      draw("text", { x: x(part * (count - 1)), y: height - 4, "text-anchor": anchor }, ago ? `${ago} min ago` : "now");
    }
    const first = sums.findIndex((row) => row[0] !== null);
    for (let n = series.length - 1; n >= 0 && first >= 0; n--) {
      const upper = [], lower = [];
      for (let i = first; i < count; i++) {
        upper.push(`${x(i).toFixed(1)},${y(sums[i][n]).toFixed(1)}`);
        lower.unshift(`${x(i).toFixed(1)},${y(stacked && n ? sums[i][n - 1] : 0).toFixed(1)}`);
      }
      draw("path", { class: series[n][0], d: `M${[...upper, ...lower].join("L")}Z` });
      draw("path", { class: `line ${series[n][0]}`, d: `M${upper.join("L")}` });
    }
    const cursor = draw("line", { class: "cursor", y1: top, y2: height - bottom, x1: -9, x2: -9 });
    svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    svg.replaceChildren(...parts);
    const legend = (index) => {
      const at = index === null ? count - 1 : index;
      const ago = Math.round((count - 1 - at) * step);
      const told = series.map(([kind, name], n) => {
        const entry = element("span");
        entry.append(element("i", "", `dot ${kind}`), `${name} `, element("b", number(padded[n][at])));
        return entry;
      });
      if (index !== null) told.push(element("span", ago ? `${duration(ago)} ago` : "now"));
      $(`${id}-legend`).replaceChildren(...told);
      return told.map((entry) => entry.textContent).join(", ");
    };
    svg.setAttribute("aria-label", legend(null));
    svg.onpointermove = (event) => {
      const place = event.clientX - svg.getBoundingClientRect().left;
      const index = Math.min(Math.max(Math.round(((place - left) / (width - left - right)) * (count - 1)), 0), count - 1);
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, x(index));
      legend(index);
    };
    svg.onpointerleave = () => {
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, -9);
      legend(null);
    };
  }

  const VALUES = {
    name: (tenant) => tenant.name,
    share: (tenant) => tenant.share ?? 0,
    tokens: (tenant) => tenant.rates.tokens,
    queue: (tenant) => tenant.queue_tokens,
    cached: (tenant) => share(tenant.hour.cached_tokens, tenant.hour.computed_tokens + tenant.hour.cached_tokens),
    refused: (tenant) => Object.entries(tenant.hour.outcomes).reduce((sum, [kind, count]) => sum + (kind === "ok" ? 0 : count), 0),
    p95: (tenant) => tenant.latency_s.p95 ?? -1,
  };
  function drawTenants() {
    const { admin, tenant: own } = last.you;
    put("tenants-title", admin ? "Tenants, last hour" : "Your tenant, last hour");
    for (const head of document.querySelectorAll("#tenants th")) {
      const by = head.firstElementChild.dataset.sort;
      if (admin && by === sort.by) head.setAttribute("aria-sort", sort.up ? "ascending" : "descending");
      else head.removeAttribute("aria-sort");
      head.hidden = !admin && head.classList.contains("admin");
    }
    const value = VALUES[sort.by];
    const rows = [...last.tenants].sort((a, b) => {
      const [left, right] = sort.up ? [value(a), value(b)] : [value(b), value(a)];
      return left < right ? -1 : left > right ? 1 : a.name < b.name ? -1 : 1;
    });
    const weighted = admin && new Set(rows.map((tenant) => tenant.weight)).size > 1;
    const body = document.querySelector("#tenants tbody");
    body.replaceChildren(...rows.map((tenant) => {
      const row = element("tr"), name = element("td", tenant.name);
      name.title = `${tenant.name}, weight ${tenant.weight}`;
      if (weighted) name.append(" ", element("span", `× ${number(tenant.weight)}`, "you wide-only"));
      if (admin && tenant.name === own && rows.length > 1) name.append(" ", element("span", "you", "you"));
      row.append(name);
      if (admin) {
        const cell = element("td", percent(VALUES.share(tenant))), bar = element("span", undefined, "bar"), fill = element("i");
        fill.style.width = `${100 * VALUES.share(tenant)}%`;
        bar.append(fill);
        cell.append(bar);
        row.append(cell);
      }
      row.append(
        element("td", number(tenant.rates.tokens)),
        element("td", number(tenant.queue_tokens), "wide-only"),
        element("td", percent(VALUES.cached(tenant)), "wide-only"),
        element("td", number(VALUES.refused(tenant))),
        element("td", seconds(tenant.latency_s.p95)),
      );
      return row;
    }));
    if (!rows.length) body.append(emptyRow("Nobody has called yet.", 7));
  }
  function emptyRow(text, columns) {
    const row = element("tr"), cell = element("td", text, "empty");
    cell.colSpan = columns;
    row.append(cell);
    return row;
  }
  function drawOutcomes() {
    const ended = Object.entries(last.hour.outcomes).sort((a, b) => b[1] - a[1]);
    const most = ended.length ? ended[0][1] : 0;
    const body = document.querySelector("#outcomes tbody");
    body.replaceChildren(...ended.map(([kind, count]) => {
      const row = element("tr"), cell = element("td", number(count)), bar = element("span", undefined, "bar"), fill = element("i");
      fill.style.width = `${100 * share(count, most)}%`;
      if (kind !== "ok") fill.className = "bad-line";
      bar.append(fill);
      cell.append(bar);
      row.append(element("td", kind === "ok" ? "answered" : words(kind)), cell);
      return row;
    }));
    if (!ended.length) body.append(emptyRow("No request has ended yet.", 2));
  }

  // ---- hands ---------------------------------------------------------------------------------------------------------
  for (const button of document.querySelectorAll(".ranges button")) {
    button.addEventListener("click", () => {
      minutes = Number(button.dataset.minutes);
      for (const other of document.querySelectorAll(".ranges button")) other.setAttribute("aria-pressed", String(other === button));
      if (last) drawCharts();
    });
  }
  for (const button of document.querySelectorAll("#tenants th button")) {
    button.addEventListener("click", () => {
      const by = button.dataset.sort;
      sort = { by, up: by === sort.by ? !sort.up : by === "name" };
      if (last) drawTenants();
    });
  }
  $("ask").addEventListener("submit", (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, $("key").value.trim());
    ask();
  });
  $("forget").addEventListener("click", () => {
    sessionStorage.removeItem(KEY);
    ask();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden && $("ask").hidden) ask(); });
  addEventListener("resize", () => { if (last) drawCharts(); });
  setInterval(() => { if (last && !$("page").hidden) age(); }, 1000);
  ask();
})();
