// An explorer of attributions: point at words and see patches, point at patches and see words.
// Its data are JSON inside of its element; all text goes through textContent.

const STEPS = 448; // pixels of a map's longer side, about
const ROUNDING = 1e-5; // patches; an edge in the middle of a patch moves up, as in Python, whatever its last digits

const decode = (text, Kind) => {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Kind(bytes.buffer);
};

/** Why values show nothing, or null; as `heat_fault` in Python. */
const faultOf = (values) => {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (!Number.isFinite(value)) return "map not finite";
    if (value < low) low = value;
    if (value > high) high = value;
  }
  const rounding = 1e-6 * Math.max(Math.abs(low), Math.abs(high)) + 1e-12;
  return values.length !== 1 && !(high - low > rounding) ? "constant map" : null;
};

/** The values that the ends of the colour bar stand for; as `limits` in Python. */
const limitsOf = (values, scale) => {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  if (scale === "range") return [low, high];
  const largest = Math.max(Math.abs(low), Math.abs(high));
  return [scale === "signed" ? -largest : 0, largest];
};

/** Values as strengths of colour in [-1, 1]; as `scaled` in Python, then without the sign that is not shown. */
const scaled = (values, scale, sign = "both") => {
  const strengths = new Float64Array(values.length);
  if (!values.length || faultOf(values) !== null) return strengths;
  const [low, high] = limitsOf(values, scale);
  const zero = scale === "range" ? low : 0;
  if (high === zero) return strengths; // a single value has nothing to be compared with
  const least = sign === "positive" ? 0 : -1, most = sign === "negative" ? 0 : 1;
  for (let i = 0; i < values.length; i++) {
    strengths[i] = Math.min(most, Math.max(least, (values[i] - zero) / (high - zero)));
  }
  return strengths;
};

/** Rows or columns that edges cover, as shares of the grid: to the nearest edges, but one at least. */
const covered = (from, to, count) => {
  const [start, end] = [from, to].map((edge) => Math.min(Math.max(edge, 0), 1) * count);
  const first = Math.floor(start + 0.5 + ROUNDING), last = Math.floor(end + 0.5 + ROUNDING);
  if (last > first) return [first, last];
  const middle = Math.min(Math.floor((start + end) / 2 + ROUNDING), count - 1);
  return [middle, middle + 1];
};

const number = (value) => (!Number.isFinite(value) ? "?" : `${value < 0 ? "\u2212" : "+"}${Math.abs(value).toPrecision(3)}`);
const quoted = (text) => `\u201c${text}\u201d`;

/** What one method says of an image and a caption. */
class Reading {
  constructor(record) {
    Object.assign(this, record);
    [this.rows, this.columns] = record.grid;
    this.patches = this.rows * this.columns;
    this.image = decode(record.image, Float32Array);
    this.text = record.text === null ? null : decode(record.text, Float32Array);
    this.pairs = record.pairs === null ? null : decode(record.pairs, Int16Array);
    this.step = record.step ?? NaN;
  }

  /** The map of some words; of the whole caption without any. */
  map(words) {
    if (!words.length || !this.pairs) return this.image;
    const sums = new Float64Array(this.patches);
    for (const word of words) {
      const start = word * this.patches;
      for (let patch = 0; patch < this.patches; patch++) sums[patch] += this.pairs[start + patch];
    }
    for (let patch = 0; patch < this.patches; patch++) sums[patch] *= this.step;
    return sums;
  }

  /** The words' values with a region of patches; with the whole image without one. */
  words(region) {
    if (!region || !this.pairs) return this.text;
    const sums = new Float64Array(this.text.length);
    for (let word = 0; word < sums.length; word++) {
      for (let row = region.rows[0]; row < region.rows[1]; row++) {
        const start = word * this.patches + row * this.columns;
        for (let column = region.columns[0]; column < region.columns[1]; column++) sums[word] += this.pairs[start + column];
      }
      sums[word] *= this.step;
    }
    return sums;
  }
}

/** A map on a canvas: linear between patches' centres; where each pixel lies is computed once, its colour at each map. */
class Heat {
  constructor(canvas, colours) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d");
    this.colours = new Uint32Array(colours.buffer);
  }

  /** Choose the pixels of a grid: an odd number of them for a patch, so that one is at its centre. */
  size(rows, columns) {
    if (this.rows === rows && this.columns === columns) return;
    Object.assign(this, { rows, columns });
    const each = Math.max(1, 2 * Math.floor(STEPS / Math.max(rows, columns) / 2) + 1);
    [this.down, this.across] = [rows, columns].map((count) => {
      const before = new Uint16Array(count * each), after = new Uint16Array(count * each);
      const share = new Float64Array(count * each);
      for (let pixel = 0; pixel < count * each; pixel++) {
        const place = Math.min(Math.max((pixel + 0.5) / each - 0.5, 0), count - 1);
        before[pixel] = Math.floor(place);
        after[pixel] = Math.min(before[pixel] + 1, count - 1);
        share[pixel] = place - before[pixel];
      }
      return { before, after, share };
    });
    this.canvas.height = rows * each;
    this.canvas.width = columns * each;
    this.picture = this.pen.createImageData(columns * each, rows * each);
    this.pixels = new Uint32Array(this.picture.data.buffer);
  }

  draw(strengths, rows, columns) {
    this.size(rows, columns);
    const { down, across, pixels, colours } = this;
    const half = colours.length / 2, last = colours.length - 1, width = across.share.length;
    const line = new Float64Array(columns);
    for (let y = 0, pixel = 0; y < down.share.length; y++) {
      const upper = down.before[y] * columns, lower = down.after[y] * columns, share = down.share[y];
      for (let column = 0; column < columns; column++) {
        line[column] = strengths[upper + column] * (1 - share) + strengths[lower + column] * share;
      }
      for (let x = 0; x < width; x++, pixel++) {
        const right = across.share[x];
        const value = line[across.before[x]] * (1 - right) + line[across.after[x]] * right;
        pixels[pixel] = colours[Math.min(((value + 1) * half) | 0, last)];
      }
    }
    this.pen.putImageData(this.picture, 0, 0);
  }
}

class Explorer {
  constructor(root) {
    this.root = root;
    this.find = (selector) => root.querySelector(selector);
    this.data = JSON.parse(this.find("script[type='application/json']").textContent);
    this.colours = decode(this.data.colours, Uint8Array);
    this.heat = new Heat(this.find("canvas.heat"), this.colours);
    this.stage = this.find(".stage");
    this.list = this.find(".words");
    this.items = [...root.querySelectorAll(".stills li")];
    this.photos = [];
    for (const still of this.items) this.photos[still.dataset.photo] = still.querySelector(".photo").getAttribute("src");
    this.photos.push(...this.data.photos);
    this.readings = new Map();
    this.state = { item: 0, caption: 0, reading: 0, sign: "both", words: [], region: null };
    this.listen();
    root.classList.add("active");
    this.find(".view").hidden = false;
    this.items.forEach((still, place) => {
      still.tabIndex = place ? -1 : 0;
      still.setAttribute("role", "option");
    });
    this.find(".stills").setAttribute("role", "listbox");
    this.find(".stills").setAttribute("aria-label", "Images");
    this.find(".stills").hidden = this.items.length < 2;
    this.find(".filter").hidden = this.items.length < 2;
    this.show(this.items.length ? Number(this.items[0].dataset.item) : 0);
  }

  get item() { return this.data.items[this.state.item]; }
  get caption() { return this.item.captions[this.state.caption]; }
  get reading() {
    const record = this.caption.readings[this.state.reading];
    if (!this.readings.has(record)) this.readings.set(record, new Reading(record));
    return this.readings.get(record);
  }
  /** The places of the phrase that is asked about. */
  get marked() { return this.caption.tokens.flatMap((token, place) => (token.marked ? [place] : [])); }
  get chosenWords() { return this.overWord === null ? this.state.words : [this.overWord]; }
  get chosenRegion() { return this.overRegion ?? this.state.region; }

  /** Show an item; where `kept`, with the phrase and region of before. */
  show(place, kept = false) {
    const { words, region } = this.state;
    this.state.item = place;
    const item = this.item;
    this.state.caption = kept ? Math.min(this.state.caption, item.captions.length - 1) : 0;
    if (this.state.reading >= this.caption.readings.length) this.state.reading = 0;
    this.stage.style.setProperty("--ratio", item.size[0] / item.size[1]);
    this.stage.classList.toggle("tiny", Math.max(...item.size) < 224);
    const photo = this.find(".stage .photo");
    photo.src = this.photos[item.photo];
    photo.alt = item.key;
    placeAt(this.find(".frame"), item.frame);
    placeAt(this.find(".stage .veil"), item.frame.map((edge) => Math.min(Math.max(edge, 0), 1)));
    this.find(".object").hidden = item.box === null || item.asksBox;
    if (item.box) placeAt(this.find(".object"), item.box);
    for (const still of this.items) {
      const here = this.data.items[still.dataset.item];
      const chosen = this.data.mode === "time" ? here.series === item.series : here === item;
      still.setAttribute("aria-selected", chosen);
      still.tabIndex = chosen ? 0 : -1;
    }
    this.showTimes();
    this.showCaptions();
    this.showReadings();
    this.showWords();
    this.reset(false);
    if (kept && words.every((word) => word < this.caption.tokens.length)) Object.assign(this.state, { words, region });
    this.render();
  }

  /** The items of the slider: those of the group. */
  get series() {
    return this.data.items.map((_, place) => place).filter((place) => this.data.items[place].series === this.item.series);
  }

  showTimes() {
    const series = this.data.mode === "time" ? this.series : [];
    const slider = this.find(".time input");
    this.find(".time").hidden = series.length < 2;
    slider.max = series.length - 1;
    slider.value = series.indexOf(this.state.item);
    slider.setAttribute("aria-valuetext", this.item.label);
    this.find(".time output").textContent = this.item.label;
  }

  showCaptions() {
    const all = this.item.captions, box = this.find(".captions");
    box.hidden = all.length < 2;
    box.replaceChildren(...all.map((caption, place) => {
      const label = make("label"), input = make("input"), output = make("output");
      Object.assign(input, { type: "radio", name: this.name, value: place, checked: place === this.state.caption });
      const { similarity } = caption.readings[Math.min(this.state.reading, caption.readings.length - 1)];
      output.textContent = similarity === null ? "" : `similarity ${similarity.toFixed(3)}`;
      label.append(input, make("span", caption.text), output);
      return label;
    }));
  }

  showReadings() {
    const select = this.find("select.method");
    select.replaceChildren(...this.caption.readings.map((reading, place) => {
      const option = make("option", [reading.method, reading.where].filter(Boolean).join(", "));
      option.value = place;
      return option;
    }));
    select.value = this.state.reading;
  }

  showWords() {
    this.chips = this.caption.tokens.map((token, place) => {
      const chip = make("span", token.text);
      chip.className = token.marked ? "word marked" : "word";
      chip.dataset.place = place;
      chip.tabIndex = place ? -1 : 0;
      chip.setAttribute("role", "option");
      return chip;
    });
    this.list.replaceChildren();
    this.chips.forEach((chip, place) => this.list.append(...(this.caption.tokens[place].joined || !place ? [chip] : [" ", chip])));
    if (!this.chips.length) this.list.textContent = this.caption.text;
  }

  /** Go back to what was asked: the phrase or the box, if there is one. */
  reset(cleared = true) {
    Object.assign(this.state, { words: [], region: null });
    this.overWord = this.overRegion = this.anchor = this.cursor = this.corner = null;
    if (cleared) return;
    if (this.reading.pairs) this.state.words = this.marked;
    if (this.reading.pairs && this.item.asksBox) {
      const [x0, y0, x1, y1] = this.item.box;
      this.state.region = this.regionOf(...this.inFrame(x0, y0), ...this.inFrame(x1, y1));
    }
  }

  /** A point of the photo, in shares of it, as a point of what the model sees. */
  inFrame(x, y) {
    const [x0, y0, x1, y1] = this.item.frame;
    return [(x - x0) / (x1 - x0), (y - y0) / (y1 - y0)];
  }

  /** The patches of a box, given in shares of what the model sees; null where it sees nothing of it. */
  regionOf(x0, y0, x1, y1) {
    const { rows, columns } = this.reading;
    const edges = [Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1)];
    if (edges[0] >= 1 || edges[1] >= 1 || edges[2] <= 0 || edges[3] <= 0) return null;
    return { edges, rows: covered(edges[1], edges[3], rows), columns: covered(edges[0], edges[2], columns) };
  }

  /** A region of patches: from one, to another one. */
  patchRegion([row, column], [otherRow, otherColumn]) {
    const { rows, columns } = this.reading;
    const [top, bottom] = [Math.min(row, otherRow), Math.max(row, otherRow) + 1];
    const [left, right] = [Math.min(column, otherColumn), Math.max(column, otherColumn) + 1];
    return { edges: [left / columns, top / rows, right / columns, bottom / rows], rows: [top, bottom], columns: [left, right] };
  }

  render() {
    const { reading, state } = this;
    this.map = reading.map(this.chosenWords);
    const fault = faultOf(this.map);
    this.heat.draw(scaled(this.map, reading.scale, state.sign), reading.rows, reading.columns);
    this.stage.classList.toggle("mapped", fault === null);
    this.find(".fault").hidden = fault === null;
    this.find(".fault").textContent = fault ?? "";
    this.showBar(fault);
    this.showStrengths();
    this.showRegion();
    this.say();
  }

  showBar(fault) {
    const { scale } = this.reading;
    const [low, high] = fault === null ? limitsOf(this.map, scale) : [NaN, NaN];
    this.find(".bar").hidden = fault !== null;
    this.find(".low").textContent = number(low);
    this.find(".high").textContent = number(high);
    const from = scale === "signed" ? 0 : 0.5;
    const stops = Array.from({ length: 9 }, (_, i) => this.colour(2 * (from + (1 - from) * i / 8) - 1));
    this.find(".ramp").style.backgroundImage = `linear-gradient(to right, ${stops.join(", ")})`;
  }

  showStrengths() {
    const { reading, state } = this;
    this.values = reading.words(this.chosenRegion);
    const strengths = this.values === null ? null : scaled(this.values, reading.scale, state.sign);
    const words = new Set(this.chosenWords);
    this.chips.forEach((chip, place) => {
      const strength = strengths === null ? 0 : strengths[place];
      chip.style.backgroundColor = this.colour(strength);
      chip.classList.toggle("strong", Math.abs(strength) > 0.6);
      chip.classList.toggle("chosen", words.has(place));
      chip.setAttribute("aria-selected", words.has(place));
    });
  }

  showRegion() {
    const box = this.find(".region"), region = this.chosenRegion;
    box.hidden = region === null;
    if (region === null) return;
    const [x0, y0, x1, y1] = this.item.frame;
    const [left, top, right, bottom] = region.edges;
    placeAt(box, [x0 + left * (x1 - x0), y0 + top * (y1 - y0), x0 + right * (x1 - x0), y0 + bottom * (y1 - y0)]);
  }

  colour(strength) {
    const count = this.colours.length / 4;
    const place = 4 * Math.min(Math.floor((strength + 1) / 2 * count), count - 1);
    const [red, green, blue, alpha] = this.colours.subarray(place, place + 4);
    return `rgb(${red} ${green} ${blue} / ${(alpha / 255).toFixed(3)})`;
  }

  phraseOf(words) {
    return words.map((word, i) => (i && !this.caption.tokens[word].joined ? " " : "") + this.caption.tokens[word].text).join("");
  }

  regionName({ rows, columns }) {
    const count = (rows[1] - rows[0]) * (columns[1] - columns[0]);
    if (count === 1) return `row ${rows[0] + 1}, column ${columns[0] + 1}`;
    return `${count} of ${this.reading.patches} patches`;
  }

  /** Say in words and numbers what is shown. */
  say() {
    const { reading, map, values } = this, words = this.chosenWords, region = this.chosenRegion;
    const apart = !reading.pairs;
    const phrase = reading.text === null ? this.marked : apart ? [] : words;
    const subject = phrase.length ? quoted(this.phraseOf(phrase)) : "the whole caption";
    let text = `Map of ${subject}, sum ${number(total(map))}`;
    if (region !== null) {
      let sum = 0;
      for (let row = region.rows[0]; row < region.rows[1]; row++) {
        for (let column = region.columns[0]; column < region.columns[1]; column++) sum += map[row * reading.columns + column];
      }
      text += `; ${this.regionName(region)}: ${number(sum)}`;
    }
    this.find(".about.map").textContent = `${text}.`;
    let about = "";
    if (values !== null) {
      about = `Words with ${region === null || apart ? "the whole image" : this.regionName(region)}, sum ${number(total(values))}`;
      if (words.length) about += `; ${quoted(this.phraseOf(words))}: ${number(words.reduce((sum, word) => sum + values[word], 0))}`;
      about += ".";
    }
    this.find(".about.text").textContent = about;
    const numbers = [reading.note];
    if (reading.similarity !== null) numbers.push(`cosine similarity ${reading.similarity.toFixed(3)}`);
    if (reading.error !== null) numbers.push(`completeness error ${number(reading.error)}`);
    numbers.push(`${reading.rows} \u00d7 ${reading.columns} patches`, this.data.mode === "time" ? "" : this.item.label);
    this.find(".numbers").textContent = numbers.filter(Boolean).join(" \u00b7 ");
    this.find(".panel .hint").textContent = this.hint;
    clearTimeout(this.timer);
    this.timer = setTimeout(() => { this.find(".live").textContent = this.spoken(subject, region); }, 150);
  }

  get hint() {
    const { text, pairs } = this.reading;
    if (pairs) return "Point at a word, or drag across several. Point at the photo, click a patch, or draw a box. Escape resets.";
    if (text) return "This method rates words and patches separately: pointing shows numbers, and changes neither map nor words.";
    return "Only this map is known. Point at the photo, click a patch, or draw a box to see its numbers.";
  }

  /** What a screen reader says: the strongest patches of the map, and the strongest words. */
  spoken(subject, region) {
    const { reading, map, values } = this;
    const fault = faultOf(map);
    const patch = (place) => `row ${Math.floor(place / reading.columns) + 1} column ${(place % reading.columns) + 1} ${number(map[place])}`;
    let text = `Map of ${subject}: `;
    text += fault ?? `strongest patches ${strongest(map).map(patch).join(", ")}`;
    if (values !== null && values.length) {
      const word = (place) => `${this.caption.tokens[place].text} ${number(values[place])}`;
      text += `. Strongest words${region === null ? "" : ` with ${this.regionName(region)}`}: ${strongest(values).map(word).join(", ")}`;
    }
    return `${text}.`;
  }

  listen() {
    this.name = `caption-${Math.random().toString(36).slice(2)}`;
    this.overWord = this.overRegion = this.anchor = this.cursor = this.corner = null;
    this.listenToWords();
    this.listenToStage();
    this.listenToControls();
    this.listenToStills();
    this.root.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || event.target.type === "search") return;
      this.reset();
      this.render();
    });
  }

  listenToWords() {
    const wordAt = (event) => {
      const found = document.elementFromPoint(event.clientX, event.clientY)?.closest(".word");
      return found && this.list.contains(found) ? Number(found.dataset.place) : null;
    };
    this.list.addEventListener("pointerdown", (event) => {
      const word = wordAt(event);
      if (word === null || event.button) return;
      event.preventDefault();
      this.chips[word].focus({ preventScroll: true });
      this.list.setPointerCapture(event.pointerId);
      const again = this.state.words.length === 1 && this.state.words[0] === word;
      this.drag = { anchor: word, again };
      this.overWord = null;
      this.choose(word, word);
    });
    this.list.addEventListener("pointermove", (event) => {
      const word = wordAt(event);
      if (this.drag) {
        if (word === null || (word === this.drag.anchor && this.state.words.length === 1)) return;
        this.drag.again = false;
        this.choose(this.drag.anchor, word);
      } else if (event.pointerType !== "touch" && word !== this.overWord) {
        this.overWord = word;
        this.render();
      }
    });
    const end = () => {
      if (!this.drag) return;
      if (this.drag.again) this.state.words = [];
      this.drag = null;
      this.render();
    };
    this.list.addEventListener("pointerup", end);
    this.list.addEventListener("pointercancel", end);
    this.list.addEventListener("pointerleave", () => {
      if (this.drag || this.overWord === null) return;
      this.overWord = null;
      this.render();
    });
    this.list.addEventListener("keydown", (event) => {
      const from = Number(event.target.dataset.place), last = this.chips.length - 1;
      const to = { ArrowRight: from + 1, ArrowDown: from + 1, ArrowLeft: from - 1, ArrowUp: from - 1, Home: 0, End: last, Enter: from, " ": from }[event.key];
      if (to === undefined || Number.isNaN(from) || isShortcut(event)) return;
      event.preventDefault();
      const next = Math.min(Math.max(to, 0), last);
      if (!event.shiftKey || this.anchor === null) this.anchor = event.shiftKey ? from : next;
      this.chips[next].focus();
      this.overWord = null;
      this.choose(this.anchor, next);
    });
    this.list.addEventListener("focusin", (event) => {
      for (const chip of this.chips) chip.tabIndex = chip === event.target ? 0 : -1;
    });
  }

  /** Choose the words from one to another one as the phrase. */
  choose(one, other) {
    const [from, to] = [Math.min(one, other), Math.max(one, other)];
    this.state.words = Array.from({ length: to - from + 1 }, (_, i) => from + i);
    this.render();
  }

  listenToStage() {
    const pointAt = (event) => {
      const box = this.stage.getBoundingClientRect();
      return this.inFrame((event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
    };
    const inside = ([x, y]) => x >= 0 && x < 1 && y >= 0 && y < 1;
    const patchAt = ([x, y]) => [Math.floor(y * this.reading.rows), Math.floor(x * this.reading.columns)];
    this.stage.addEventListener("pointerdown", (event) => {
      if (event.button) return;
      this.stage.setPointerCapture(event.pointerId);
      this.box = { from: pointAt(event), at: [event.clientX, event.clientY], moved: false };
    });
    this.stage.addEventListener("pointermove", (event) => {
      const point = pointAt(event);
      if (this.box) {
        const far = Math.hypot(event.clientX - this.box.at[0], event.clientY - this.box.at[1]);
        this.box.moved ||= far > 4;
        if (!this.box.moved) return;
        this.overRegion = null;
        this.state.region = this.regionOf(...this.box.from, ...point);
        this.render();
      } else if (event.pointerType !== "touch") {
        const region = inside(point) ? this.patchRegion(patchAt(point), patchAt(point)) : null;
        if (sameRegion(region, this.overRegion)) return;
        this.overRegion = region;
        this.render();
      }
    });
    this.stage.addEventListener("pointerup", (event) => {
      if (!this.box) return;
      const point = pointAt(event);
      if (!this.box.moved) {
        const region = inside(point) ? this.patchRegion(patchAt(point), patchAt(point)) : null;
        this.state.region = sameRegion(region, this.state.region) ? null : region;
      }
      this.box = this.overRegion = null;
      this.render();
    });
    this.stage.addEventListener("pointercancel", () => { this.box = null; });
    this.stage.addEventListener("pointerleave", () => {
      if (this.box || this.overRegion === null) return;
      this.overRegion = null;
      this.render();
    });
    this.stage.addEventListener("keydown", (event) => {
      const step = { ArrowRight: [0, 1], ArrowLeft: [0, -1], ArrowDown: [1, 0], ArrowUp: [-1, 0] }[event.key];
      if (step === undefined || isShortcut(event)) return;
      event.preventDefault();
      const { rows, columns } = this.reading;
      const [row, column] = this.cursor ?? [-step[0], -step[1]];
      this.cursor = [Math.min(Math.max(row + step[0], 0), rows - 1), Math.min(Math.max(column + step[1], 0), columns - 1)];
      if (!event.shiftKey || this.corner === null) this.corner = this.cursor;
      this.overRegion = null;
      this.state.region = this.patchRegion(this.corner, this.cursor);
      this.render();
    });
  }

  listenToControls() {
    this.find("select.method").addEventListener("change", (event) => {
      const region = this.state.region, { rows, columns } = this.reading;
      this.state.reading = Number(event.target.value);
      const other = rows !== this.reading.rows || columns !== this.reading.columns;
      if (region && other) this.state.region = this.regionOf(...region.edges);
      this.cursor = null;
      this.showCaptions();
      this.render();
    });
    this.find("select.sign").addEventListener("change", (event) => {
      this.state.sign = event.target.value;
      this.render();
    });
    this.find("input.opacity").addEventListener("input", (event) => {
      this.find(".frame").style.opacity = event.target.value / 100;
    });
    this.find("button.reset").addEventListener("click", () => {
      this.reset();
      this.render();
    });
    this.find(".captions").addEventListener("change", (event) => {
      this.state.caption = Number(event.target.value);
      if (this.state.reading >= this.caption.readings.length) this.state.reading = 0;
      this.state.words = [];
      this.overWord = this.anchor = null;
      this.showReadings();
      this.showWords();
      this.render();
    });
    this.find(".time input").addEventListener("input", (event) => this.show(this.series[Number(event.target.value)], true));
  }

  listenToStills() {
    const stills = this.find(".stills"), output = this.find(".filter output");
    const choose = (still) => {
      if (!still) return;
      const place = Number(still.dataset.item);
      const { label } = this.item;
      const same = this.data.items.findIndex((item) => item.series === this.data.items[place].series && item.label === label);
      this.show(this.data.mode === "time" && same >= 0 ? same : place);
    };
    stills.addEventListener("click", (event) => choose(event.target.closest("li")));
    stills.addEventListener("keydown", (event) => {
      const shown = this.items.filter((still) => !still.hidden), from = shown.indexOf(document.activeElement);
      const to = { ArrowRight: from + 1, ArrowLeft: from - 1, Home: 0, End: shown.length - 1 }[event.key];
      if (to === undefined || !shown[to] || isShortcut(event)) return;
      event.preventDefault();
      choose(shown[to]);
      shown[to].focus();
    });
    this.find(".filter input").addEventListener("input", (event) => {
      const asked = event.target.value.trim().toLowerCase();
      let count = 0;
      for (const still of this.items) {
        const { key, label, series, captions } = this.data.items[still.dataset.item];
        const text = [key, label, series, ...captions.map((caption) => caption.text)].join("\n").toLowerCase();
        still.hidden = !text.includes(asked);
        count += !still.hidden;
      }
      output.textContent = asked ? `${count} of ${this.items.length}` : "";
      const chosen = this.items.find((still) => still.getAttribute("aria-selected") === "true");
      if (chosen?.hidden) choose(this.items.find((still) => !still.hidden));
    });
  }
}

/** Whether keys belong to the browser, as Alt and an arrow do. */
const isShortcut = (event) => event.altKey || event.ctrlKey || event.metaKey;

const make = (tag, text = "") => Object.assign(document.createElement(tag), { textContent: text });

const placeAt = (element, [x0, y0, x1, y1]) => {
  const [left, top, width, height] = [x0, y0, x1 - x0, y1 - y0].map((share) => `${100 * share}%`);
  Object.assign(element.style, { left, top, width, height });
};

const total = (values) => values.reduce((sum, value) => sum + value, 0);

const strongest = (values, count = 3) =>
  [...values.keys()].sort((a, b) => Math.abs(values[b]) - Math.abs(values[a])).slice(0, count);

const sameRegion = (one, other) =>
  one === other || (one !== null && other !== null && String([one.rows, one.columns]) === String([other.rows, other.columns]));

for (const root of document.querySelectorAll(".explorer")) root.explorer = new Explorer(root);
