"""The lever downgrade: overloaded, vision-heavy ranks run a layer's experts at low precision."""
