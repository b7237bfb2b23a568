// The page's side of PuLID: a badge on the accordion that says what is on, and photos by drag and drop or paste.

class Pulid {
    constructor(tab) {
        this.tab = tab;
    }

    /** An element of the accordion: element("1_weight") is #pulid_txt2img_1_weight. */
    element(name) {
        return gradioApp().querySelector(`#pulid_${this.tab}${name && "_" + name}`);
    }

    get accordion() {
        return this.element("");
    }

    /** Adds the listeners, once per page; called again until gradio has built the accordion. */
    connect() {
        if (!this.accordion || this.accordion.dataset.pulid) return;
        this.accordion.dataset.pulid = "connected";
        setInterval(() => this.lookForFiles(), 1000);
        for (const event of ["input", "change", "click", "keyup"]) {
            this.accordion.addEventListener(event, () => setTimeout(() => this.refresh(), 60));
        }
        this.accordion.addEventListener("keydown", (event) => Pulid.openByKey(event));
        this.accordion.addEventListener("dragover", (event) => this.hover(event, true));
        this.accordion.addEventListener("dragleave", (event) => this.hover(event, false));
        this.accordion.addEventListener("drop", (event) => this.drop(event), true);
        this.accordion.addEventListener("click", (event) => this.removePhoto(event));
        this.accordion.addEventListener("click", (event) => this.showNote(event));
    }

    /** Opens an accordion by key: in gradio 3 the titles are not buttons. */
    static openByKey(event) {
        const title = event.target;
        if (!title.matches("div.label-wrap") || !["Enter", " "].includes(event.key)) return;
        event.preventDefault();
        title.click();
    }

    // ---------------------------------------------------------------- badge

    refresh() {
        if (!this.accordion) return;
        this.followCheckpoint();
        for (const title of this.accordion.querySelectorAll("div.label-wrap:not([tabindex])")) {
            title.tabIndex = 0;
            title.setAttribute("role", "button");
        }
        const label = this.accordion.querySelector(".label-wrap");
        if (!label) return;
        let badge = label.querySelector(".pulid-badge");
        if (!badge) {
            badge = document.createElement("span");
            badge.className = "pulid-badge";
            label.insertBefore(badge, label.children[1] ?? null);
        }
        const text = this.isOn() ? this.units().map((unit) => unit.text).join(" · ") || "on, no person selected" : "";
        if (badge.textContent !== text) badge.textContent = text;
        badge.classList.toggle("pulid-missing", this.isOn() && !this.units().every((unit) => unit.ready));
        this.markTabs();
    }

    isOn() {
        const box = gradioApp().querySelector(`#pulid_${this.tab}-checkbox input, #pulid_${this.tab}-visible-checkbox`);
        return box ? box.checked : this.accordion.querySelector(".label-wrap").classList.contains("open");
    }

    /** Returns the numbers of all people. */
    people() {
        const numbers = [];
        while (this.element(`${numbers.length + 1}_enabled`)) numbers.push(numbers.length + 1);
        return numbers;
    }

    /** Returns the units that are on, with the badge's text for each. */
    units() {
        return this.people().map((n) => this.unit(n)).filter(Boolean);
    }

    /** Returns the badge's text for person n, and whether a photo or an identity is there; null if the person is off. */
    unit(n) {
        if (!this.element(`${n}_enabled`).querySelector("input").checked) return null;
        const photos = this.element(`${n}_photos`).querySelectorAll("img").length;
        const chosen = this.element(`${n}_identity`).querySelector("input")?.value ?? "";
        const saved = chosen === "None" ? "" : chosen;
        const draws = (this.element(`${n}_draw`)?.querySelector("input")?.value || "off") !== "off";
        const given = photos ? `${photos} photo${photos > 1 ? "s" : ""}` : draws ? "a drawn photo" : "";
        const who = saved || given || "no photo";
        const weight = this.element(`${n}_weight`).querySelector("input[type=number]")?.value ?? "";
        return {ready: Boolean(saved || given), text: `${n}: ${who}, ${weight}`};
    }

    isUsed(n) {
        return Boolean(this.unit(n)?.ready);
    }

    /** Marks the tabs of the people in use. */
    markTabs() {
        this.element("units")?.querySelectorAll(".tab-nav > button").forEach((tab, index) => {
            tab.classList.toggle("pulid-used", this.isUsed(index + 1));
        });
    }

    // ---------------------------------------------------------------- checkpoint

    /** Returns the selected checkpoint; "" if the page does not show it. */
    static checkpoint() {
        const field = gradioApp().querySelector("#setting_sd_model_checkpoint input, .model_selection input");
        return field?.value ?? "";
    }

    /** Lets the server show the settings of the checkpoint's family when another one is selected, and at the start. */
    followCheckpoint() {
        if (Pulid.followed[this.tab] !== Pulid.checkpoint()) this.element("checkpoint")?.click();
    }

    static followed = {};

    /** Returns the checkpoint's name for the server. A click before gradio listens does not get here. */
    static follow(tab) {
        return Pulid.followed[tab] = Pulid.checkpoint();
    }

    /** Asks which files are missing: until the server has answered once, and during a download. */
    lookForFiles() {
        if (Pulid.looked[this.tab] && !this.element("missing")?.querySelector("progress")) return;
        this.element("missing_look")?.click();
    }

    static looked = {};

    /** Called when gradio handles the click; see above. */
    static look(tab) {
        Pulid.looked[tab] = true;
    }

    // ---------------------------------------------------------------- photos

    /** Returns the drop zones of all people. */
    zones() {
        return this.people().map((n) => this.element(`${n}_drop`));
    }

    /** Returns the drop zone that an element of the accordion belongs to. */
    zone(target) {
        return this.zones().find((zone) => zone?.closest(".pulid-photos")?.contains(target));
    }

    /** Returns the number of the person whose tab is open. */
    selected() {
        return this.zones().findIndex((zone) => zone && zone.offsetParent !== null) + 1;
    }

    hover(event, over) {
        const zone = this.zone(event.target);
        if (!zone) return;
        event.preventDefault();
        zone.classList.toggle("pulid-over", over);
    }

    drop(event) {
        const zone = this.zone(event.target);
        const files = Pulid.pictures(event.dataTransfer);
        if (!zone) return;
        zone.classList.remove("pulid-over");
        if (!files.length) return;
        event.preventDefault();
        event.stopPropagation();
        Pulid.give(zone, files);
    }

    /** Returns whether pasted images were added. */
    paste(event) {
        const zone = this.accordion && this.isOn() && this.zones()[this.selected() - 1];
        const files = Pulid.pictures(event.clipboardData);
        const near = zone && (this.accordion.contains(event.target) || this.accordion.matches(":hover"));
        if (!near || !files.length) return false;
        Pulid.give(zone, files);
        return true;
    }

    /** Removes the photo whose ✕ was clicked. */
    removePhoto(event) {
        const cross = event.target.closest(".pulid-strip button");
        if (!cross) return;
        Pulid.removed = Number(cross.dataset.index);
        const owner = this.people().find((n) => this.element(`${n}_photos`)?.contains(cross));
        this.element(`${owner}_remove`)?.click();
    }

    static removed = -1;

    /** Scrolls to what a button for an identity or a preset answers: on a narrow page it may be out of sight. */
    showNote(event) {
        const note = event.target.closest(".pulid-tool")?.closest(".tabitem")?.querySelector(".pulid-note");
        if (!note) return;
        this.answer?.disconnect();
        this.answer = new MutationObserver(() => {
            this.answer.disconnect();
            note.scrollIntoView({block: "nearest"});
        });
        this.answer.observe(note, {childList: true, characterData: true, subtree: true});
    }

    /** Lists the images among dropped or pasted files; those without a type may be HEIC or a camera's, which the server reads. */
    static pictures(transfer) {
        return [...(transfer?.files ?? [])].filter((file) => !file.type || file.type.startsWith("image/"));
    }

    /** Passes files to gradio's own file input, as if they had been chosen there. */
    static give(zone, files) {
        const input = zone.querySelector("input[type=file]");
        if (!input) return;
        const transfer = new DataTransfer();
        for (const file of files) transfer.items.add(file);
        input.files = transfer.files;
        input.dispatchEvent(new Event("change", {bubbles: true}));
    }

    // ---------------------------------------------------------------- both tabs

    static start() {
        const tabs = [new Pulid("txt2img"), new Pulid("img2img")];
        const connect = () => tabs.forEach((tab) => {
            tab.connect();
            tab.refresh();
        });
        onUiLoaded(connect);
        onAfterUiUpdate(connect);
        document.addEventListener("paste", (event) => {
            if (!tabs.some((tab) => tab.paste(event))) return;
            event.preventDefault();
            event.stopImmediatePropagation(); // the WebUI would put it into img2img
        }, true);
        return tabs;
    }

    // The hosts' places for input images, one per tab of img2img.
    static INPUTS = ["#img2img_image", "#img2img_sketch", "#img2maskimg", "#inpaint_sketch", "#img_inpaint_base"];

    /** Returns the image in the open tab of img2img, if there is one. */
    static input(tab) {
        if (tab !== "img2img") return undefined;
        return Pulid.images(Pulid.INPUTS.map((place) => `${place} img`)).find((one) => one.offsetParent !== null);
    }

    /** Returns the images in some places, without icons and what is not loaded. */
    static images(places) {
        const images = [...gradioApp().querySelectorAll(places.join(", "))];
        return images.filter((one) => one.src && one.naturalWidth > 32);
    }

    /** Returns the width and height of what masks and boxes are parts of: the input image, at most 1024 wide and high,
        or else the image to generate. */
    pictureSize(tab) {
        const input = Pulid.input(tab);
        if (input) {
            const size = [input.naturalWidth, input.naturalHeight];
            return size.map((side) => Math.max(1, Math.round(side * Math.min(1, 1024 / Math.max(...size)))));
        }
        const value = (side) => Number(gradioApp().querySelector(`#${tab}_${side} input[type=number]`)?.value) || 512;
        return [value("width"), value("height")];
    }
}

const pulid = Pulid.start()[0];
