"""rhythm inside other projects; each module here imports the one project it is named after."""
