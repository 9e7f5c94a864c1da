"""The command line: parses words, calls one public function, prints."""
