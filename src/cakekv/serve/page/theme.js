// Light or dark as the system says, or as was chosen here; before anything is drawn, so not a module.
(() => {
  "use strict";
  const chosen = () => {
    try {
      return localStorage.getItem("cakekv.theme");
    } catch {
      return null; // storage is switched off
    }
  };
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = () => {
    const dark = (chosen() ?? (system.matches ? "dark" : "light")) === "dark";
    document.documentElement.dataset.theme = dark ? "dark" : "light";
    document.getElementById("theme")?.setAttribute("aria-pressed", String(dark));
  };
  system.addEventListener("change", apply);
  addEventListener("storage", apply);
  addEventListener("DOMContentLoaded", () => {
    apply();
    document.getElementById("theme").addEventListener("click", () => {
      const next = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
      try {
        if ((next === "dark") === system.matches) localStorage.removeItem("cakekv.theme");
        else localStorage.setItem("cakekv.theme", next);
      } finally {
        apply();
      }
    });
  });
  apply();
})();
