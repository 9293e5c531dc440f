"""A page as tests read it, and text that no page may take as HTML."""
import re
from html.parser import HTMLParser

HOSTILE = '<script>alert(1)</script><img src=x onerror="alert(2)">&amp;\' \u202e\x00\x1b[31m ça 日本 😀 \ud83d </style>--> ' + "x" * 9000


class Page(HTMLParser):
    """A parsed page: every tag is closed in its turn, or this raises."""

    def __init__(self, source):
        super().__init__()
        self.source, self.open, self.tags, self.texts = source, [], [], []
        self.feed(source)
        self.close()
        assert not self.open, f"left open: {self.open}"
        self.text = re.sub(r"\s+", " ", "".join(self.texts))                 # a narrow space is a space here
        self.headings = [self.between(i) for i, (tag, _) in enumerate(self.tags) if tag == "h2"]

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in ("meta", "br", "wbr"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes) | {"": len(self.texts)}))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"
        self.texts += [" "] * (tag not in ("b", "i", "mark", "span"))

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.texts.append(data)

    def between(self, i):
        return self.texts[self.tags[i][1][""]].strip()

    def all(self, tag, kind=""):
        return [attributes for name, attributes in self.tags if name == tag and kind in (attributes.get("class") or "").split() + [""]]
