// A page that is opened as a file may not read other files, which excerpts of search results are taken from.
if (location.protocol === "file:") DOCUMENTATION_OPTIONS.SHOW_SEARCH_SUMMARY = false;
