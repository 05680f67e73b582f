// The cards of the restores: this conversation's, and those of other clients since the page was opened.

import { Card } from "./card.js";
import { h } from "./dom.js";

const SHOWN = 20;

export class Panel {
  constructor(place) {
    this.place = place;
    this.cards = new Map();
    this.none = h("p", { class: "none" }, "Of each answer's prompt: what was loaded, and what was computed meanwhile.");
  }

  /** Show these, the latest first. Cards that were there before stay the same elements. */
  show(restores) {
    const shown = restores.sort((one, other) => other.began - one.began).slice(0, SHOWN);
    const old = this.cards;
    const card = (restore) => (old.get(restore.id)?.restore === restore ? old.get(restore.id) : new Card(restore));
    this.cards = new Map(shown.map((restore) => [restore.id, card(restore)]));
    const elements = [...this.cards.values()].map((card) => card.element);
    if (!elements.length) elements.push(this.none);
    const now = this.place.children;
    if (elements.length === now.length && elements.every((element, at) => element === now[at])) return;
    this.place.replaceChildren(...elements);
    [...this.cards.values()].slice(1).forEach((card) => (card.more.open = false));
  }

  update(restore) {
    this.cards.get(restore.id)?.update();
  }

  focus(id) {
    const element = this.cards.get(id)?.element;
    element?.scrollIntoView({ block: "nearest" });
    element?.focus({ preventScroll: true });
  }
}
