// Blend: a slider for each of the people to blend. The shares are percentages that always add up to 100.

class Blend {
    static tabs = {};

    /** Shows a slider for each of these people; gradio calls it when the selection changes. */
    static choose(tab, people) {
        (Blend.tabs[tab] ??= new Blend(tab)).choose(people ?? []);
        return [];
    }

    /** Returns the shares for the server, in the order of the people; "" if they are equal. */
    static shares(tab) {
        return Blend.tabs[tab]?.written() ?? "";
    }

    constructor(tab) {
        this.tab = tab;
        this.people = []; // [name, share]
    }

    /** Keeps the proportions of those who stay; whoever is new gets an equal share. */
    choose(names) {
        const known = new Map(this.people);
        const stay = names.filter((name) => known.has(name));
        const kept = stay.reduce((sum, name) => sum + known.get(name), 0);
        const scale = kept ? (100 * stay.length / names.length) / kept : 0;
        this.people = names.map((name) => [name, known.has(name) ? known.get(name) * scale : 100 / names.length]);
        this.draw();
    }

    written() {
        const shares = this.people.map(([, share]) => share);
        const equal = Math.max(...shares) - Math.min(...shares) < 0.01;
        return equal ? "" : shares.map((share) => share.toFixed(3)).join(", ");
    }

    /** Sets one share; the others keep their proportions. */
    set(index, share) {
        const scale = (100 - share) / (100 - this.people[index][1]);
        this.people = this.people.map(([name, old], i) => [name, i === index ? share : old * scale]);
        this.update();
    }

    /** Lists the saved people anew when the panel is opened: some may have been saved since the page was made. */
    static start() {
        document.addEventListener("click", ({target}) => {
            const panel = target.closest?.(".label-wrap")?.closest("[id$=_blend_panel]");
            if (panel) gradioApp().querySelector(`#${panel.id.replace("panel", "refresh")}`)?.click();
        });
    }

    // ---------------------------------------------------------------- drawing

    get place() {
        return gradioApp().querySelector(`#pulid_${this.tab}_blend_shares .pulid-shares`);
    }

    draw() {
        const shown = this.people.length > 1 ? this.people : [];
        this.place?.replaceChildren(...shown.map(([name], index) => this.slider(name, index)));
        this.update();
    }

    slider(name, index) {
        const label = document.createElement("label");
        const words = document.createElement("span");
        words.textContent = words.title = name;
        const slider = document.createElement("input");
        Object.assign(slider, {type: "range", min: 1, max: 99, step: 1});
        slider.addEventListener("input", () => this.set(index, Number(slider.value)));
        label.append(words, slider, document.createElement("output"));
        return label;
    }

    update() {
        [...this.place?.children ?? []].forEach((label, index) => {
            const share = this.people[index][1];
            const text = `${Number(share.toFixed(share < 1 ? 1 : 0))} %`;
            const slider = label.querySelector("input");
            slider.value = share;
            slider.setAttribute("aria-valuetext", text);
            label.querySelector("output").textContent = text;
        });
    }
}

Blend.start();
