"""The sections of a report: each turns frames into blocks of the page."""
