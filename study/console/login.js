"use strict";
// Exchanges the token, given in the address or in the form, for a cookie that no script can read.
(() => {
  const said = document.getElementById("said");
  const open = async (token) => {
    said.textContent = "";
    try {
      const answer = await fetch("/api/login", {
        method: "POST",
        headers: { "Content-Type": "application/json", "X-Maskstudy": "1" },
        body: JSON.stringify({ token }),
      });
      if (answer.ok) return location.reload();
      const failed = { error: `The console has failed (${answer.status}); its own log says why.` };
      said.textContent = (await answer.json().catch(() => failed)).error;
    } catch {
      said.textContent = "The console does not answer.";
    }
  };
  const fromAddress = () => {
    const given = new URLSearchParams(location.hash.slice(1)).get("token");
    if (given === null) return;
    history.replaceState(null, "", location.pathname); // out of the history and of sight
    open(given);
  };
  addEventListener("hashchange", fromAddress); // an address pasted while this page was open
  fromAddress();
  document.getElementById("login").addEventListener("submit", (event) => {
    event.preventDefault();
    open(document.getElementById("token").value.trim());
  });
})();
