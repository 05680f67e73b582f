// Listens to the server's events, and to whether it is there.

import { ask, events, ServerError } from "./api.js";
import { Restore } from "./restore.js";

const AGAIN_S = [1, 2, 4, 8, 15];

/**
 * Follow restores for as long as the page is open.
 *
 * `changed(restore)` is called whenever one has moved or ended, `connected(error)` with null once the server listens to
 * us, and with what is wrong when it no longer does.
 */
export class Watch {
  constructor({ changed, connected }) {
    this.restores = new Map();
    this.changed = changed;
    this.connected = connected;
    this.tries = 0;
    this.run();
  }

  /** Connect now, with a new key for instance. */
  again() {
    this.tries = 0;
    this.stop?.abort();
    this.wake?.();
  }

  async run() {
    for (;;) {
      this.stop = new AbortController();
      let wrong = null;
      try {
        const response = await ask("cakekv/events", { signal: this.stop.signal });
        this.tries = 0;
        this.connected(null);
        for await (const event of events(response)) this.hear(event);
        wrong = new ServerError("gone", "The server has closed the connection.");
      } catch (error) {
        if (error.name !== "AbortError") wrong = error;
      }
      this.lose();
      if (!wrong) continue;
      const wait = AGAIN_S[Math.min(this.tries++, AGAIN_S.length - 1)];
      this.connected(wrong, wait);
      await new Promise((resolve) => {
        this.wake = resolve;
        if (wrong.kind !== "key") setTimeout(resolve, 1000 * wait); // a key comes from the user
      });
    }
  }

  hear({ event, data }) {
    const said = JSON.parse(data);
    const id = said.request_id;
    if (!id) return;
    let restore = this.restores.get(id);
    if (!restore) this.restores.set(id, (restore = new Restore({ id })));
    if (event === "progress") restore.progress(said);
    else if (event === "report") restore.finish(said.report);
    else if (event === "failed") restore.fail(said.error);
    else return;
    this.changed(restore);
  }

  /** Nothing more will be heard of restores that go on. */
  lose() {
    for (const restore of this.restores.values()) {
      if (restore.ended) continue;
      restore.fail("The connection to the server broke before the end was heard.");
      this.changed(restore);
    }
  }
}
