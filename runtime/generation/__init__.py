"""From a question to its answer: requests, the key/value cache, decoding and sampling."""
