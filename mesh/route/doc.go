// Package route decides which rule of a mesh.Route a request or a connection
// meets, and to which backend it goes. The decision is a pure function of the
// route and of what is asked: the first rule that matches counts.
package route
