// Follows a run: asks for its data every few seconds, and shows what has changed. All text goes through textContent.

const EVERY = 2000; // milliseconds between two questions
const SVG = "http://www.w3.org/2000/svg";
const [WIDEST, NARROWEST, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [520, 280, 260, 44, 8, 10, 34];
const COLOURS = 6;
const MOST_DOTS = 60;

const at = (id) => document.getElementById(id);

const made = (name, attributes = {}, text = null) => {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
};

const drawn = (name, attributes = {}, text = null) => {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== null) element.textContent = text;
  return element;
};

const number = (value, unit) => (value === null ? "–" : `${Number(value.toPrecision(4))}${unit ? ` ${unit}` : ""}`);

/** Round values from low to high, about so many. */
const ticks = (low, high, count) => {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) found.push(i * step + 0); // no -0
  return found;
};

/** The path of a line, with a gap where there is no value. */
const path = (line, x, y) => {
  let text = "", pen = "M";
  line.values.forEach((value, i) => {
    if (value === null) { pen = "M"; return; }
    text += `${pen}${x(i).toFixed(1)} ${y(value).toFixed(1)}`;
    pen = "L";
  });
  return text;
};

/** One panel of curves; a legend below shows the numbers of the measurement under the pointer, else of the last one. */
const panel = ({ title, unit, steps, lines }) => {
  const width = Math.min(WIDEST, Math.max(NARROWEST, at("curves").clientWidth));
  const values = lines.flatMap((line) => line.values.filter((value) => value !== null));
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (unit) low = 0;
  if (high <= low) high = low + 1;
  const [first, last] = [steps[0], Math.max(steps[steps.length - 1], steps[0] + 1)];
  const x = (i) => LEFT + ((steps[i] - first) / (last - first)) * (width - LEFT - RIGHT);
  const y = (value) => HEIGHT - BOTTOM - ((value - low) / (high - low)) * (HEIGHT - TOP - BOTTOM);
  const known = lines.map((line) => line.values.filter((value) => value !== null));
  const course = lines.map((line, i) => `${line.name} from ${number(known[i][0] ?? null, unit)} to ${number(known[i].at(-1) ?? null, unit)}`);
  const svg = drawn("svg", { viewBox: `0 0 ${width} ${HEIGHT}`, role: "img" });
  svg.setAttribute("aria-label", `${title}: ${steps.length} measurements; ${course.join(", ")}.`);
  for (const value of ticks(low, high, 4)) {
    svg.append(drawn("line", { class: "grid", x1: LEFT, x2: width - RIGHT, y1: y(value), y2: y(value) }));
    svg.append(drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, `${Number(value.toPrecision(6))}`));
  }
  for (const step of ticks(first, last, 5)) {
    const place = LEFT + ((step - first) / (last - first)) * (width - LEFT - RIGHT);
    const anchor = place > width - 2 * RIGHT - 12 ? "end" : "middle"; // nothing is drawn beyond the edge
    svg.append(drawn("text", { x: place, y: HEIGHT - BOTTOM + 16, "text-anchor": anchor }, step.toLocaleString("en")));
  }
  svg.append(drawn("text", { x: width - RIGHT, y: HEIGHT - 4, "text-anchor": "end" }, "steps"));
  const legend = made("ul", { class: "legend" });
  // Where colours come again, dashes tell the lines apart.
  const looks = lines.map((line, i) => `line-${i % COLOURS}${line.dashed || i >= COLOURS ? " dashed" : ""}`);
  lines.forEach((line, i) => {
    svg.append(drawn("path", { class: looks[i], d: path(line, x, y) }));
    line.values.forEach((value, j) => {
      if (value !== null && steps.length <= MOST_DOTS) svg.append(drawn("circle", { class: looks[i], cx: x(j), cy: y(value), r: 3 }));
    });
    const item = made("li", { class: looks[i] });
    item.append(made("span"));
    legend.append(item);
  });
  const pointer = drawn("line", { class: "pointer", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
  svg.append(pointer);
  const caption = made("figcaption");
  const show = (i) => {
    caption.textContent = `${title}${unit ? ` [${unit}]` : ""}${i === null ? "" : `, step ${steps[i].toLocaleString("en")}`}`;
    lines.forEach((line, j) => {
      legend.children[j].firstChild.textContent = `${line.name} ${number(line.values[i ?? steps.length - 1], unit)}`;
    });
    pointer.setAttribute("visibility", i === null ? "hidden" : "visible");
    if (i !== null) for (const end of ["x1", "x2"]) pointer.setAttribute(end, x(i));
  };
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const place = ((event.clientX - box.left) / box.width) * width;
    let nearest = 0;
    for (let i = 1; i < steps.length; i++) if (Math.abs(x(i) - place) < Math.abs(x(nearest) - place)) nearest = i;
    show(nearest);
  });
  svg.addEventListener("pointerleave", () => show(null));
  show(null);
  const figure = made("figure");
  figure.append(caption, svg, legend);
  return figure;
};

/** The rows of headings: groups above, if there are any. */
const headings = (columns) => {
  const head = made("thead"), row = made("tr");
  if (columns.some((column) => column.group)) {
    const groups = made("tr");
    columns.forEach(({ group }, i) => {
      if (i && columns[i - 1].group === group) { groups.lastChild.colSpan += 1; return; }
      groups.append(made(group ? "th" : "td", group ? { scope: "colgroup", colspan: 1 } : { colspan: 1 }, group));
    });
    head.append(groups);
  }
  for (const column of columns) row.append(made("th", { scope: "col", class: column.numeric ? "number" : "" }, column.heading));
  head.append(row);
  return head;
};

/** Show the table; rows that are as they were stay, so that only new ones are drawn. */
const showTable = ({ columns, rows }) => {
  const table = at("table"), box = table.parentElement;
  const atEnd = box.scrollTop + box.clientHeight >= box.scrollHeight - 4;
  const key = JSON.stringify(columns);
  if (table.dataset.columns !== key) {
    table.replaceChildren(headings(columns), made("tbody"));
    table.dataset.columns = key;
  }
  const body = table.tBodies[0];
  rows.forEach((texts, i) => {
    const line = JSON.stringify(texts);
    if (body.rows[i]?.dataset.line === line) return;
    const row = made("tr");
    row.dataset.line = line;
    texts.forEach((text, j) => row.append(made("td", { class: columns[j].numeric ? "number" : "" }, text)));
    if (body.rows[i]) body.rows[i].replaceWith(row);
    else body.append(row);
  });
  while (body.rows.length > rows.length) body.lastElementChild.remove();
  if (atEnd) box.scrollTop = box.scrollHeight;
};

const showExcluded = (places) => {
  const lines = places.map(({ where, measured, reasons }) => {
    const counts = reasons.map(([reason, count]) => `${count.toLocaleString("en")} ${reason}`).join(", ") || "nothing left out";
    return made("li", {}, `${where}: ${measured === null ? "" : `${measured.toLocaleString("en")} measured; `}${counts}`);
  });
  at("excluded").replaceChildren(...lines);
};

/** Load the explorer again with the new measurements; its slider stays where it is, or at the end if it was there. */
const showExamples = (version) => {
  const frame = at("explorer");
  at("examples").hidden = version === null;
  if (version === null || frame.dataset.version === version) return;
  frame.dataset.version = version;
  const slider = () => frame.contentDocument?.querySelector(".time input");
  const before = slider();
  const place = before && Number(before.value) < Number(before.max) ? before.value : null;
  const scroll = frame.contentWindow?.scrollY ?? 0;
  frame.addEventListener("load", () => {
    const body = frame.contentDocument.body;
    new ResizeObserver(() => { frame.style.height = `${body.scrollHeight + 2}px`; }).observe(body);
    const now = slider();
    if (now && before) {
      now.value = place ?? now.max;
      now.dispatchEvent(new Event("input", { bubbles: true }));
      frame.contentWindow.scrollTo(0, scroll);
    }
  }, { once: true });
  frame.contentWindow.location.replace(new URL("explorer", location.href)); // no step back for each measurement
};

let written = null, panels = [];

const showCurves = () => at("curves").replaceChildren(...panels.map(panel));
let across = 0;
addEventListener("resize", () => {
  if (across !== innerWidth) showCurves();
  across = innerWidth;
});

const show = (data) => {
  document.title = data.name;
  at("status").textContent = data.status;
  at("fault").textContent = data.fault ?? "";
  at("fault").hidden = data.fault === null;
  at("notes").replaceChildren(...data.notes.map((note) => made("li", {}, note)));
  written = data.written;
  if (data.fault !== null) return; // what was read before stays
  panels = data.panels;
  showCurves();
  showExamples(data.examples);
  showTable(data.table);
  showExcluded(data.excluded);
};

/** How long ago something was, in words. */
const ago = (seconds) => {
  const [count, unit] = seconds < 90 ? [seconds, "second"] : seconds < 5400 ? [seconds / 60, "minute"] : [seconds / 3600, "hour"];
  const whole = Math.max(0, Math.round(count));
  return `${whole} ${unit}${whole === 1 ? "" : "s"} ago`;
};

let tag = null;

const ask = async () => {
  try {
    const answer = await fetch("run.json", { headers: tag === null ? {} : { "If-None-Match": tag }, cache: "no-store" });
    if (answer.status === 200) {
      show(await answer.json());
      tag = answer.headers.get("ETag");
    } else if (answer.status !== 304) {
      throw new Error(await answer.text());
    }
    // By the server's clock, which wrote the files.
    const now = Date.parse(answer.headers.get("Date")) / 1000;
    at("age").textContent = written === null ? "" : `Measured ${ago(now - written)}.`;
  } catch (error) {
    const gone = error instanceof TypeError;
    at("age").textContent = gone ? "The server does not answer: start `watch` again, and this page goes on." : error.message;
  }
};

// The token is in a cookie now; it is not to stay in the history.
if (location.search) history.replaceState(null, "", location.pathname);

const follow = async () => {
  if (!document.hidden) await ask();
  setTimeout(follow, EVERY);
};
document.addEventListener("visibilitychange", () => document.hidden || ask());
follow();
