// Package loop carries TCP connections through HBONE tunnels from event loops:
// a few goroutines, each with its own epoll, and no goroutine for a connection.
//
// A tunnel and all the connections in it belong to one loop, which alone reads
// and writes their sockets and their state, so there are no locks between them.
// What takes its time (handshakes, decisions and dials that must wait) runs on
// ordinary goroutines, and hands the loop a socket when it is ready.
//
// One read of a tunnel's socket serves the frames of many streams, and what
// they answer goes out in one record and one write at the end of the batch of
// events. Bulk data is read from an application's socket behind room for a
// frame header, and sealed and written without a copy.
package loop
