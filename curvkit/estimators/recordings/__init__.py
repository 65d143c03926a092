"""Forward passes that are recorded, and what is looked at before they are trusted."""
