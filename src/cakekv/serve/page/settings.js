// What every request asks for, kept in this browser.

import { $ } from "./dom.js";

const NAME = "cakekv.settings";
const DEFAULTS = { system: "", tokens: 512, temperature: 0 };

export function settings() {
  try {
    return { ...DEFAULTS, ...JSON.parse(localStorage.getItem(NAME)) };
  } catch {
    return DEFAULTS;
  }
}

/** Open the dialog. */
export function openSettings() {
  const now = settings();
  $("set-system").value = now.system;
  $("set-tokens").value = now.tokens;
  $("set-temperature").value = now.temperature;
  $("settings-dialog").showModal();
}

/** Keep what the dialog says. */
export function keepSettings() {
  const now = {
    system: $("set-system").value.trim(),
    tokens: $("set-tokens").valueAsNumber,
    temperature: $("set-temperature").valueAsNumber,
  };
  localStorage.setItem(NAME, JSON.stringify(now));
}
