"use strict";
// Makes headings sort: rows go by the column whose heading was activated, baselines after the others, empty cells last.
for (const table of document.querySelectorAll("table")) {
  const headings = [...table.tHead.rows[table.tHead.rows.length - 1].cells];
  const body = table.tBodies[0];
  const number = (row, column) => row.cells[column].querySelector("data");
  headings.forEach((heading, column) => {
    const numeric = body.rows.length > 0 && number(body.rows[0], column) !== null;
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    heading.scope = "col";
    heading.setAttribute("aria-sort", "none");
    if (numeric) heading.className = "number";
    button.addEventListener("click", () => {
      const before = heading.getAttribute("aria-sort");
      const first = before === "none" ? numeric : before === "ascending";
      const sign = first ? -1 : 1;
      for (const other of headings) other.setAttribute("aria-sort", "none");
      heading.setAttribute("aria-sort", first ? "descending" : "ascending");
      const compare = (a, b) => {
        const aside = (row) => row.querySelector(".baseline") !== null;
        if (aside(a) !== aside(b)) return aside(a) - aside(b);
        const [x, y] = [a.cells[column], b.cells[column]];
        if (!numeric) return sign * x.textContent.localeCompare(y.textContent, "en", { numeric: true });
        const [p, q] = [number(a, column).value, number(b, column).value];
        if (p === "" || q === "") return (p === "") - (q === "");
        return sign * (Number(p) - Number(q));
      };
      for (const row of [...body.rows].sort(compare)) body.append(row);
    });
  });
}
