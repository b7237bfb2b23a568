// Regions: boxes that one draws, moves and resizes over a frame of the image's shape, one color per person. The values
// are kept in each person's text field "Box": x, y, width and height as fractions of the image.

class Regions {
    static COLORS = ["#3b82f6", "#f97316", "#22c55e", "#ec4899", "#eab308", "#8b5cf6"];
    static LEAST = 0.04; // of the image's width and height; anything smaller was a click
    static STEP = 0.02; // of an arrow key
    static FIRST = [0.25, 0.25, 0.5, 0.5]; // the box that the key Enter adds

    constructor(tab) {
        this.tab = tab;
        this.pulid = new Pulid(tab);
    }

    get frame() {
        return this.pulid.element("regions")?.querySelector(".pulid-frame");
    }

    field(n) {
        return this.pulid.element(`${n}_box`)?.querySelector("input, textarea");
    }

    /** Returns person n's box as [x, y, width, height], or null. */
    read(n) {
        const numbers = (this.field(n)?.value ?? "").split(/[\s,]+/).filter(Boolean).map(Number);
        return numbers.length === 4 && numbers.every(Number.isFinite) ? numbers : null;
    }

    write(n, box) {
        const field = this.field(n);
        field.value = box ? box.map((value) => Number(value.toFixed(3))).join(" ") : "";
        field.dispatchEvent(new Event("input", {bubbles: true}));
        this.draw();
    }

    /** Returns the number of the person whose tab is open. */
    selected() {
        return this.pulid.selected() || 1;
    }

    /** Returns the boxes of all people, as [person, box, whether it has an effect]. */
    boxes() {
        return this.pulid.people().map((n) => [n, this.read(n), this.pulid.isUsed(n)]).filter(([, box]) => box);
    }

    // ---------------------------------------------------------------- drawing

    /** Brings the frame up to date; does nothing while it is hidden or nothing has changed. */
    draw() {
        const frame = this.frame;
        if (!frame || frame.offsetParent === null) return;
        if (!frame.dataset.pulid) this.connect(frame);
        const [width, height] = pulid.pictureSize(this.tab);
        const background = this.background();
        const shown = this.boxes();
        const state = JSON.stringify([width, height, background, this.selected(), shown]);
        if (frame.pulidState === state || this.drag) return;
        frame.pulidState = state;
        frame.style.aspectRatio = `${width} / ${height}`;
        frame.style.maxWidth = `${Math.round(360 * width / height)}px`;
        frame.style.backgroundImage = background ? `url("${background}")` : "";
        const focused = frame.contains(document.activeElement) && document.activeElement.dataset.person;
        frame.replaceChildren(...shown.map((shape) => this.boxElement(...shape)));
        if (focused) frame.querySelector(`[data-person="${focused}"]`)?.focus();
    }

    boxElement(n, box, used) {
        const element = document.createElement("div");
        element.className = "pulid-box";
        element.classList.toggle("pulid-selected", n === this.selected());
        element.classList.toggle("pulid-unused", !used);
        if (!used) element.title = `Person ${n} has no photo or is off: this box has no effect`;
        element.dataset.person = n;
        element.tabIndex = 0;
        element.setAttribute("role", "group");
        element.setAttribute("aria-label", `Person ${n}: arrow keys move the box, with Shift they resize it, Delete removes it`);
        element.style.setProperty("--color", Regions.COLORS[(n - 1) % Regions.COLORS.length]);
        this.place(element, box);
        const name = document.createElement("span");
        name.textContent = n;
        const remove = document.createElement("button");
        remove.type = "button";
        remove.textContent = "✕";
        remove.setAttribute("aria-label", `Remove the box of person ${n}`);
        remove.addEventListener("click", () => this.remove(n));
        const corner = document.createElement("i");
        element.append(name, remove, corner);
        return element;
    }

    /** Removes a box; the keyboard goes on in the frame. */
    remove(n) {
        this.write(n, null);
        this.frame.focus();
    }

    place(element, [x, y, width, height]) {
        Object.entries({left: x, top: y, width, height}).forEach(([side, value]) => {
            element.style[side] = `${100 * value}%`;
        });
    }

    /** Returns what is behind the boxes: the input image, or the last result. */
    background() {
        return (Pulid.input(this.tab) ?? Pulid.images([`#${this.tab}_gallery img`])[0])?.src ?? "";
    }

    // ---------------------------------------------------------------- mouse, pen, finger

    connect(frame) {
        frame.dataset.pulid = "connected";
        frame.tabIndex = 0;
        frame.setAttribute("role", "group");
        frame.setAttribute("aria-label", "Regions: Enter adds a box for the person whose tab is open");
        frame.addEventListener("pointerdown", (event) => this.begin(event));
        frame.addEventListener("pointermove", (event) => this.move(event));
        frame.addEventListener("pointerup", (event) => this.end(event));
        frame.addEventListener("pointercancel", () => this.cancel());
        frame.addEventListener("keydown", (event) => this.key(event));
    }

    /** Returns the place of an event in the image, 0..1. */
    at(event) {
        const frame = this.frame.getBoundingClientRect();
        const share = (value, start, length) => Math.min(1, Math.max(0, (value - start) / length));
        return [share(event.clientX, frame.left, frame.width), share(event.clientY, frame.top, frame.height)];
    }

    begin(event) {
        if (event.button !== 0 || event.target.matches("button")) return;
        const element = event.target.closest(".pulid-box");
        const n = element ? Number(element.dataset.person) : this.selected();
        const kind = !element ? "draw" : event.target.matches("i") ? "resize" : "move";
        this.drag = {n, kind, from: this.at(event), box: element ? this.read(n) : null, element};
        if (!element) {
            this.frame.querySelector(`[data-person="${n}"]`)?.remove();
            this.drag.element = this.boxElement(n, [...this.drag.from, 0, 0], this.pulid.isUsed(n));
            this.frame.append(this.drag.element);
        }
        this.frame.setPointerCapture(event.pointerId);
        event.preventDefault();
        this.drag.element.focus();
    }

    move(event) {
        if (!this.drag) return;
        this.drag.now = this.dragged(this.at(event));
        this.place(this.drag.element, this.drag.now);
    }

    dragged([x, y]) {
        const {kind, from, box} = this.drag;
        if (kind === "draw") return [Math.min(x, from[0]), Math.min(y, from[1]), Math.abs(x - from[0]), Math.abs(y - from[1])];
        const [dx, dy] = [x - from[0], y - from[1]];
        return kind === "move" ? Regions.moved(box, dx, dy) : Regions.resized(box, dx, dy);
    }

    end(event) {
        if (!this.drag) return;
        const {n, now, kind} = this.drag;
        this.cancel();
        const isClick = kind === "draw" && now && Math.min(now[2], now[3]) < Regions.LEAST;
        if (!now || isClick) return;
        this.write(n, now);
        if (kind === "draw") this.frame.querySelector(`[data-person="${n}"]`)?.focus();
    }

    cancel() {
        this.drag = null;
        this.frame.pulidState = "";
        this.draw();
    }

    static moved([x, y, width, height], dx, dy) {
        const within = (value, length) => Math.min(1 - length, Math.max(0, value));
        return [within(x + dx, width), within(y + dy, height), width, height];
    }

    static resized([x, y, width, height], dx, dy) {
        const within = (value, start) => Math.min(1 - start, Math.max(Regions.LEAST, value));
        return [x, y, within(width + dx, x), within(height + dy, y)];
    }

    // ---------------------------------------------------------------- keys

    key(event) {
        if (event.target === this.frame) return this.add(event);
        const n = Number(event.target.closest(".pulid-box")?.dataset.person);
        const box = n && !event.target.matches("button") && this.read(n);
        if (!box) return;
        const [dx, dy] = {ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1]}[event.key] ?? [0, 0];
        const remove = ["Delete", "Backspace"].includes(event.key);
        if (!dx && !dy && !remove) return;
        event.preventDefault();
        event.stopPropagation();
        const change = event.shiftKey ? Regions.resized : Regions.moved;
        if (remove) this.remove(n);
        else this.write(n, change(box, dx * Regions.STEP, dy * Regions.STEP));
    }

    /** Adds a box in the middle for the selected person, or goes to the one that is there. */
    add(event) {
        if (event.key !== "Enter") return;
        event.preventDefault();
        const n = this.selected();
        if (!this.read(n)) this.write(n, Regions.FIRST);
        this.frame.querySelector(`[data-person="${n}"]`)?.focus();
    }

    // ---------------------------------------------------------------- both tabs

    static start() {
        const tabs = [new Regions("txt2img"), new Regions("img2img")];
        const draw = () => tabs.forEach((tab) => tab.draw());
        onUiLoaded(draw);
        onAfterUiUpdate(draw);
        for (const event of ["input", "change", "click"]) {
            document.addEventListener(event, () => setTimeout(draw, 80));
        }
    }
}

Regions.start();
