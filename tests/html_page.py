"""An HTML page, as a parser reads it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """A page's elements, words and script; fails where tags do not match."""

    def __init__(self, text):
        super().__init__()
        self.text = text
        self.elements, self.words, self.script, self.style, self.open = [], [], "", "", []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] == ["script"]:
            self.script += data
        elif self.open[-1:] == ["style"]:
            self.style += data
        else:
            self.words.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]
