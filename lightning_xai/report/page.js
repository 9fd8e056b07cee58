"use strict";
// Sorts a table's rows by the column whose heading was activated, within each group of rows; empty cells stay last.
for (const button of document.querySelectorAll("thead button")) {
  button.addEventListener("click", () => {
    const heading = button.closest("th");
    const table = heading.closest("table");
    const column = [...heading.parentElement.children].indexOf(heading);
    const numeric = heading.classList.contains("number");
    const before = heading.getAttribute("aria-sort");
    const order = before === "none" ? (numeric ? "descending" : "ascending")
      : before === "ascending" ? "descending" : "ascending";
    const sign = order === "ascending" ? 1 : -1;
    for (const other of table.querySelectorAll("th[aria-sort]")) other.setAttribute("aria-sort", "none");
    heading.setAttribute("aria-sort", order);
    const compare = (a, b) => {
      const [x, y] = [a.children[column], b.children[column]];
      if (!numeric) return sign * x.textContent.localeCompare(y.textContent, "en", { numeric: true });
      const [p, q] = [x.dataset.value, y.dataset.value];
      if (p === "" || q === "") return (p === "") - (q === "");
      return sign * (Number(p) - Number(q));
    };
    for (const body of table.tBodies) {
      const rows = [...body.rows].filter((row) => !row.classList.contains("group"));
      for (const row of rows.sort(compare)) body.append(row);
    }
  });
}
