"""AdamW's update of a parameter and its moments."""
